"""Two processes over gloo train as one does; only the first of them writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from dspark_training.processes import LaunchedProcesses, Processes
from dspark_training.target import Target
from dspark_training.trainer import Trainer

from dspark_serving.errors import OptionError
from tests.test_training_run import config, samples
from tests.tiny_models import make_tiny_target

_ROOT = Path(__file__).resolve().parents[1]


def run(target: Target, output: Path, processes: Processes, micro_batches: int = 2) -> list[float]:
    """Losses of every step of a tiny run."""
    optim = config(10, 3e-3).optim.model_copy(update={"pool": 4, "micro_batches": micro_batches})
    losses: list[float] = []
    told = config(10).model_copy(update={"optim": optim})
    trainer = Trainer(told, target, samples(), output, processes)
    trainer.run(lambda report: losses.append(report.loss))
    name = f"losses-{processes.rank}-{processes.world}.json"
    (output.parent / name).write_text(
        json.dumps({"losses": losses, "validation": [row["validation_loss"] for row in trainer.history]})
    )
    return losses


def main(root: Path) -> None:
    """What torchrun starts."""
    target = Target.load(root / "target")
    run(target, root / "two", LaunchedProcesses(target.model.device))


def test_two_processes_give_the_losses_of_one_with_the_same_global_batch(tmp_path: Path) -> None:
    make_tiny_target(tmp_path / "target", "llama")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, "-m", "tests.test_training_distributed", str(tmp_path)], check=True, cwd=_ROOT)
    target = Target.load(tmp_path / "target")
    one = run(target, tmp_path / "one", Processes())
    other_batch = run(target, tmp_path / "half", Processes(), micro_batches=1)
    first = json.loads((tmp_path / "losses-0-2.json").read_text())
    second = json.loads((tmp_path / "losses-1-2.json").read_text())
    assert first["losses"] == pytest.approx(one, rel=1e-4)
    assert second["losses"] == pytest.approx(first["losses"]), "a loss is the mean over the processes"
    assert other_batch != pytest.approx(one, rel=1e-3), "half the global batch is another run"
    assert len(first["validation"]) == 2
    assert second["validation"] == [], "only the first process validates"
    assert len((tmp_path / "two" / "log.jsonl").read_text().splitlines()) == 2


def test_micro_batches_that_do_not_split_are_refused(tmp_path: Path) -> None:
    class Three(Processes):
        world = 3

    make_tiny_target(tmp_path / "target", "llama")
    with pytest.raises(OptionError, match="micro"):
        run(Target.load(tmp_path / "target"), tmp_path / "out", Three())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
