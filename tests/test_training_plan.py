"""The plan's figures against a run of the same configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from dspark_training import checkpoint
from dspark_training.config import FeaturesConfig, RunConfig
from dspark_training.data.store import SampleStore
from dspark_training.plan import make_plan
from dspark_training.target import Target
from dspark_training.trainer import Trainer
from dspark_training.workdir import mark_complete

from dspark_serving.errors import DataError
from tests.test_training_run import config, samples
from tests.tiny_models import make_tiny_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = tmp_path_factory.mktemp("target")
    make_tiny_target(path, "llama")
    return Target.load(path)


def with_cache(told: RunConfig) -> RunConfig:
    return told.model_copy(update={"features": FeaturesConfig(source="cached", codec="int4", cap_gb=0.01)})


@pytest.mark.parametrize("named", [False, True])
def test_a_plan_of_existing_samples_agrees_with_the_run(target: Target, tmp_path: Path, named: bool) -> None:
    rows = samples()
    store = tmp_path / ("answers.jsonl" if named else "samples.jsonl")
    SampleStore(store).append(rows)
    told = with_cache(config(40))
    if named:
        told = told.model_copy(update={"data": told.data.model_copy(update={"samples": str(store)})})
    before = sorted(p.name for p in tmp_path.iterdir())
    plan = make_plan(told, target, tmp_path, seconds=0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "a plan writes nothing"
    trainer = Trainer(told, target, rows, tmp_path)
    trainer.run()
    assert plan.exact
    assert plan.samples == len(rows)
    assert plan.sample_tokens == pytest.approx(sum(len(s.ids) for s in rows) / len(rows))
    assert plan.tokens == pytest.approx(trainer.tokens, rel=0.1)
    assert plan.disk_features == pytest.approx(trainer.source.counts.disk_bytes, rel=0.2)  # type: ignore[attr-defined]
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    written = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    assert plan.disk_checkpoint / 2 == pytest.approx(written, rel=0.1)
    assert plan.step_seconds > 0
    assert plan.answer_seconds == 0


def test_a_plan_before_any_answer_gives_limits(target: Target, tmp_path: Path) -> None:
    told = config(40)
    data = told.data.model_copy(
        update={"written_prompts": {"chat": 100}, "max_samples": 50, "max_new_tokens": 16, "batch_size": 4}
    )
    plan = make_plan(told.model_copy(update={"data": data}), target, tmp_path / "work", seconds=0.5)
    assert (plan.samples, plan.answers_left, plan.exact) == (50, 50, False)
    assert plan.answer_seconds > 0
    assert plan.disk_features == 0, "online features take no disk"
    assert any("at most" in line for line in plan.lines())
    with pytest.raises(DataError, match="prompts"):
        make_plan(told, target, tmp_path / "work", seconds=0.5)


def test_a_plan_asks_for_nothing_more_where_the_answers_are_complete(target: Target, tmp_path: Path) -> None:
    SampleStore(tmp_path / "samples.jsonl").append(samples())
    settings = {"written_prompts": {"chat": 100}, "max_new_tokens": 16, "batch_size": 4}
    told = config(40).model_copy(update={"data": config(40).data.model_copy(update=settings)})
    assert make_plan(told, target, tmp_path, seconds=0.5).answers_left == 100 - 24
    mark_complete(tmp_path, 24)
    plan = make_plan(told, target, tmp_path, seconds=0.5)
    assert (plan.samples, plan.answers_left, plan.exact) == (24, 0, True)
