"""A whole run, from prompts to the bundle: what it names, and what a second call in the same directory does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from dspark_training.config import DataConfig, RunConfig, WarmStartConfig
from dspark_training.data.skipped import Skipped
from dspark_training.data.store import SampleStore
from dspark_training.data.tokens import build, load_samples
from dspark_training.run import run_recipe
from dspark_training.target import Target
from dspark_training.trainer import Trainer

from dspark_serving.errors import CheckpointError, DataError, OptionError
from tests.test_training_run import config, samples
from tests.tiny_models import make_tiny_target

ROWS = [{"prompt": f"say {letter}"} for letter in "abcdefghijkl"]
ANSWERS = "answers by the target"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_target(path, "llama")
    return Target.load(path)


def recipe(**data: Any) -> RunConfig:
    """A few steps on short greedy answers."""
    settings: dict[str, Any] = {"greedy_share": 1.0, "max_new_tokens": 12, "validation_share": 0.2}
    return config(4).model_copy(update={"data": DataConfig(**settings | data)})


def prompt_file(path: Path, rows: Sequence[dict[str, str]] = ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(told: RunConfig, target: Target, root: Path, evaluation: Sequence[Path] = ()) -> set[str]:
    """Run it in `root`; the stages in which the target was asked for something."""
    stages: set[str] = set()

    def on_answers(stage: str, done: int, total: int) -> None:
        stages.add(stage)

    run_recipe(told, target, root / "bundle", root / "work", list(evaluation), lambda step: None, on_answers)
    return stages


def test_the_bundle_names_its_target_and_every_file_of_its_data(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark_training.run.EVALUATION_TOKENS", 12)
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    prompt_file(tmp_path / "questions.jsonl", ROWS[:2])
    run(recipe(prompts=(str(tmp_path / "saved"),)), target, tmp_path, [tmp_path / "questions.jsonl"])
    made = json.loads((tmp_path / "bundle" / "training.json").read_text())
    assert made["facts"]["target"] == "tiny"
    assert [row["dataset"] for row in made["facts"]["evaluation"]] == ["questions"]
    hashed = {Path(name).name for name in made["data_sha256"]}
    assert {"state.json", "dataset_info.json", "samples.jsonl"} <= hashed
    assert any(name.endswith(".arrow") for name in hashed)
    assert json.loads((tmp_path / "work" / "run.json").read_text())["data_sha256"] == made["data_sha256"]


def test_a_trained_work_directory_belongs_to_one_recipe_and_one_target(target: Target, tmp_path: Path) -> None:
    told, noted = recipe(prompts=(prompt_file(tmp_path / "p.jsonl"),)), tmp_path / "work" / "run.json"
    run(told, target, tmp_path)
    before = noted.read_text()
    faster = told.model_copy(update={"optim": told.optim.model_copy(update={"learning_rate": 0.002})})
    with pytest.raises(OptionError, match=r"optim\.learning_rate 0\.001, this run has 0\.002"):
        run(faster, target, tmp_path)
    make_tiny_target(tmp_path / "other", "llama", seed=1)
    with pytest.raises(OptionError, match=r"the target tiny .* this one is other"):
        run(told, Target.load(tmp_path / "other"), tmp_path)
    assert noted.read_text() == before
    run(told.model_copy(update={"licence": "mit", "save_every_seconds": 60.0}), target, tmp_path)
    assert "license: mit" in (tmp_path / "bundle" / "README.md").read_text()
    noted.write_text("{")
    with pytest.raises(OptionError, match=r"run\.json does not say"):
        run(told, target, tmp_path)


def test_a_trained_work_directory_belongs_to_the_content_of_its_data(target: Target, tmp_path: Path) -> None:
    given, noted = tmp_path / "given.jsonl", tmp_path / "work" / "run.json"
    SampleStore(given).append(samples())
    told = recipe(samples=str(given))
    run(told, target, tmp_path)
    before, rows = noted.read_text(), given.read_bytes()
    SampleStore(given).append([samples()[0]._replace(key="new")])
    with pytest.raises(OptionError, match=r"given\.jsonl has changed since .*work was trained on it"):
        run(told, target, tmp_path)
    assert noted.read_text() == before
    given.write_bytes(rows)
    run(told, target, tmp_path)


def changed(told: RunConfig, group: str, **fields: Any) -> RunConfig:
    return told.model_copy(update={group: getattr(told, group).model_copy(update=fields)})


def test_settings_that_do_not_fit_the_target_are_named_before_it_answers(target: Target, tmp_path: Path) -> None:
    told = recipe(prompts=(prompt_file(tmp_path / "p.jsonl"),))
    start = WarmStartConfig(path=str(tmp_path / "nothing"))
    for wrong, named in [
        (changed(told, "drafter", init_layers=(99,)), r"drafter\.init_layers \[99\] do not exist"),
        (changed(told, "drafter", target_layer_ids=(2, 0)), r"drafter\.target_layer_ids is \[2, 0\].*ascending"),
        (changed(told, "drafter", target_layer_ids=()), r"drafter\.target_layer_ids is \[\].*at least one"),
        (changed(told, "features", layer_ids=(0, 2, 2)), r"features\.layer_ids is \[0, 2, 2\]"),
        (changed(told, "features", layer_ids=(0, 2, 9)), r"features\.layer_ids \[9\] do not exist"),
        (changed(told, "features", layer_ids=(0, 1)), r"features\.layer_ids \[0, 1\] lack \[2\]"),
        (told.model_copy(update={"warm_start": start}), "nothing"),
    ]:
        with pytest.raises((OptionError, CheckpointError), match=named):
            run(wrong, target, tmp_path)
    assert not (tmp_path / "work").exists()


def test_a_target_that_shows_no_layers_is_refused_before_it_answers(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target.model, "get_decoder", lambda: torch.nn.Identity())
    with pytest.raises(CheckpointError, match="exposes no hidden states"):
        run(recipe(prompts=(prompt_file(tmp_path / "p.jsonl"),)), target, tmp_path)
    assert not (tmp_path / "work").exists()


def test_before_a_checkpoint_only_what_answers_come_from_must_stay(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, answers = recipe(prompts=(prompt_file(tmp_path / "p.jsonl"),)), tmp_path / "work" / "samples.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr("dspark_training.run.Trainer", lambda *arguments: 1 / 0)  # killed behind the answers
        with pytest.raises(ZeroDivisionError):
            run(told, target, tmp_path)
    before = answers.read_text()
    with pytest.raises(OptionError, match=r"data\.max_new_tokens 12, this run has 13"):
        run(recipe(prompts=told.data.prompts, max_new_tokens=13), target, tmp_path)
    assert ANSWERS not in run(told, target, tmp_path)
    assert answers.read_text() == before


def first_token(target: Target, prompt: str) -> int:
    ids = torch.tensor([target.chat_ids(prompt)])
    out = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    return int(out[0, -1])


def test_a_resumed_run_has_the_same_samples_though_some_answers_were_unusable(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts = [first_token(target, row["prompt"]) for row in ROWS]
    rare = sorted(set(firsts), key=firsts.count)[:2]  # answers that begin with them are empty
    assert len(set(firsts)) > 2, "the control: other answers are not"
    monkeypatch.setattr(target.model.generation_config, "eos_token_id", [511, *rare])
    answers = tmp_path / "work" / "samples.jsonl"
    told = recipe(prompts=(prompt_file(tmp_path / "p.jsonl"),), max_samples=11)
    assert ANSWERS in run(told, target, tmp_path)
    before = answers.read_text()
    assert before.count("\n") < 11
    (tmp_path / "p.jsonl").unlink()
    assert ANSWERS not in run(told, target, tmp_path)
    assert answers.read_text() == before
    answers.write_text("".join(before.splitlines(keepends=True)[1:]))
    with pytest.raises(OptionError, match=r"samples\.jsonl has changed"):
        run(told, target, tmp_path)
    shutil.rmtree(tmp_path / "work" / "checkpoints")
    with pytest.raises(DataError, match=r"samples\.complete\.json"):
        run(told, target, tmp_path)


def test_answers_of_unknown_temperature_end_in_a_bundle_that_is_not_calibrated(target: Target, tmp_path: Path) -> None:
    SampleStore(tmp_path / "given.jsonl").append(s._replace(temperature=None) for s in samples())
    run(recipe(samples=str(tmp_path / "given.jsonl")), target, tmp_path)
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "24 at unknown" in card
    assert "24 answers by others" in card
    assert "predicted survival" not in card


def test_two_evaluation_files_of_one_name_are_refused_before_anything_is_written(
    target: Target, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="two evaluation files are called chat"):
        run(recipe(), target, tmp_path, [tmp_path / "a" / "chat.jsonl", tmp_path / "b" / "chat.jsonl"])
    assert not (tmp_path / "work").exists()


def test_a_memory_mapped_store_trains_as_a_list_does(target: Target, tmp_path: Path) -> None:
    SampleStore(tmp_path / "s.jsonl").append(samples())
    build([tmp_path / "s.jsonl"], tmp_path / "store", Skipped(None))
    listed = Trainer(config(6), target, samples(), tmp_path / "listed")
    mapped = Trainer(config(6), target, load_samples(tmp_path / "store"), tmp_path / "mapped")
    listed.run()
    mapped.run()
    for (name, a), b in zip(listed.drafter.state_dict().items(), mapped.drafter.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
