"""What goes wrong in a training run: figures that are not finite, a full disk, a kill; nothing good is lost."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dspark_training import checkpoint
from dspark_training.runlog import RunLog
from dspark_training.target import Target
from dspark_training.trainer import StepReport, Trainer, TrainingError
from dspark_training.workdir import write_run
from safetensors.torch import load_file

from dspark_serving.errors import CheckpointError, DataError
from tests.test_training_run import KilledError, config, samples
from tests.tiny_models import make_tiny_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = tmp_path_factory.mktemp("target")
    make_tiny_target(path, "llama")
    return Target.load(path)


def _nan_weights(trainer: Trainer) -> None:
    trainer.drafter.fc.weight.data.fill_(float("nan"))


def _infinite_gradient(trainer: Trainer) -> None:
    trainer.drafter.fc.weight.register_hook(lambda gradient: gradient.fill_(float("inf")))


@pytest.mark.parametrize(
    ("poison", "named"),
    [(_nan_weights, "the loss is nan at step 3"), (_infinite_gradient, "the norm of the gradients is inf at step 3")],
)
def test_what_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    target: Target, tmp_path: Path, poison: Callable[[Trainer], None], named: str
) -> None:
    trainer = Trainer(config(8), target, samples(), tmp_path)

    def on_step(report: StepReport) -> None:
        if report.step == 3:
            saved = checkpoint.latest(tmp_path / "checkpoints")
            assert saved is not None, "the control: there is something to lose"
            poison(trainer)

    with pytest.raises(TrainingError, match=named):
        trainer.run(on_step)
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    assert json.loads((newest / "state.json").read_text())["step"] == 2
    assert all(weight.isfinite().all() for weight in load_file(newest / "model.safetensors").values())


def test_a_finished_run_that_is_repeated_keeps_its_checkpoint_all_the_time(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(config(4), target, samples(), tmp_path).run()
    removed: list[Path] = []
    rmtree = shutil.rmtree

    def watched(path: Path, *args: Any, **options: Any) -> None:
        removed.append(path)
        rmtree(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    again = Trainer(config(4), target, samples(), tmp_path)
    again.run()
    assert again.step == 4
    assert not [path for path in removed if path.name.startswith("step-")]
    assert checkpoint.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-0000004"


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(target: Target, tmp_path: Path) -> None:
    trainer = Trainer(config(8), target, samples(), tmp_path)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(report: StepReport) -> None:
        if report.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    try:
        with pytest.raises(CheckpointError, match=r"the checkpoint .*step-0000004 cannot be written") as caught:
            trainer.run(fill)
        with pytest.raises(CheckpointError, match=r"the weights .*best\.safetensors cannot be written"):
            checkpoint.save_weights(tmp_path / "best.safetensors", trainer.drafter)
        with pytest.raises(DataError, match=r"run\.json cannot be written"):
            write_run(tmp_path, {"recipe": "x" * 5000})
        records = RunLog(tmp_path, tensorboard=False)
        with pytest.raises(DataError, match=r"log\.jsonl cannot be written"):
            records.add({"step": 1, "text": "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "Free some" in caught.value.fix
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]


def test_the_log_of_a_resumed_run_has_every_validation_once(target: Target, tmp_path: Path) -> None:
    def kill(report: StepReport) -> None:
        if report.step == 11:
            raise KilledError

    told = config(20).model_copy(update={"save_every_seconds": 3600.0})
    with pytest.raises(KilledError):
        Trainer(told, target, samples(), tmp_path).run(kill)
    log = tmp_path / "log.jsonl"
    assert log.read_text().count("\n") == 2
    with log.open("a") as file:
        file.write('{"step": 1')  # killed in mid-write
    resumed = Trainer(told, target, samples(), tmp_path)
    resumed.run()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert rows == resumed.history
