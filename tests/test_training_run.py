"""Generation, storage and the training loop: equal to transformers, resumable, nothing lost."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from dspark_training import checkpoint
from dspark_training.config import DataConfig, DrafterShape, OptimConfig, RunConfig
from dspark_training.data.blocks import cut_blocks, draw_anchors, pad
from dspark_training.data.generate import Request, complete
from dspark_training.data.store import Sample, SampleStore
from dspark_training.data.vocab import DraftVocab
from dspark_training.optimizer import learning_rate
from dspark_training.run import DEMO_RECIPE, load_recipe
from dspark_training.target import Target
from dspark_training.trainer import StepReport, Trainer, TrainingError

from dspark_serving.errors import DataError, DsparkError, OptionError
from tests.tiny_models import make_tiny_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = tmp_path_factory.mktemp("target")
    make_tiny_target(path, "llama")
    return Target.load(path)


def samples(n: int = 24) -> list[Sample]:
    rng = random.Random(0)
    rows = []
    for i in range(n):
        prompt = [rng.randrange(500) for _ in range(rng.randrange(3, 9))]
        ids = prompt + [(i + 3 * j) % 90 for j in range(20)]
        rows.append(Sample(f"{i:03}", "math", 0.0, ids, [(len(prompt), len(ids))]))
    return rows


def config(steps: int, learning_rate: float = 1e-3, pool: int = 1) -> RunConfig:
    return RunConfig(
        data=DataConfig(prompts=(), validation_share=0.2),
        drafter=DrafterShape(
            target_layer_ids=(0, 2), mask_token_id=3, block_size=3, markov_rank=4, draft_vocab_size=128
        ),
        optim=OptimConfig(steps=steps, sequences=2, anchors=4, learning_rate=learning_rate, pool=pool),
        save_every_seconds=1e-6,
        validate_every_steps=5,
    )


def test_batched_completion_equals_transformers_one_by_one(target: Target) -> None:
    rng = random.Random(1)
    requests = [
        Request(str(i), [rng.randrange(90) for _ in range(rng.randrange(2, 30))], 0.0, rng.choice([5, 12, 40]))
        for i in range(13)
    ]
    generator = torch.Generator().manual_seed(0)
    got = {c.key: c for batch in complete(target, requests, batch_size=5, generator=generator) for c in batch}
    assert set(got) == {r.key for r in requests}
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        alone = target.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, do_sample=False
        )
        assert got[request.key].answer_ids == alone[0, ids.shape[1] :].tolist()


def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s.jsonl")
    store.append(samples(3))
    with store.path.open("a") as file:
        file.write('{"key": "half')
    assert list(SampleStore(store.path)) == samples(3)


def test_blocks_carry_the_tokens_behind_their_anchor() -> None:
    sequences = pad(
        [Sample("a", "math", 0.0, [1, 2, 3, 4, 5, 6], [(2, 6)]), Sample("b", "math", 0.0, [1, 7, 8], [(1, 3)])]
    )
    anchors = draw_anchors(sequences, 10, 1, random.Random(0))[0]
    blocks = cut_blocks(sequences, anchors, 3)
    ids = [[1, 2, 3, 4, 5, 6], [1, 7, 8]]
    seen = set()
    for b, row in enumerate(ids):
        for a, anchor in enumerate(anchors[b].tolist()):
            if anchor < 0:
                assert not blocks.valid_BAK[b, a].any()
                continue
            seen.add((b, anchor))
            behind = row[anchor + 1 : anchor + 4]
            assert blocks.valid_BAK[b, a].tolist() == [k < len(behind) for k in range(3)]
            assert blocks.labels_BAK[b, a, : len(behind)].tolist() == behind
            assert blocks.previous_BAK[b, a, : len(behind)].tolist() == row[anchor : anchor + len(behind)]
    assert seen == {(0, 2), (0, 3), (0, 4), (1, 1)}  # every answer token that has one behind it


def test_draft_vocabulary_keeps_frequent_tokens_and_stop_tokens() -> None:
    vocab, coverage = DraftVocab.most_frequent(
        [Sample("a", "x", 0.0, [5, 5, 5, 9, 9, 7], [(0, 6)])], 3, 20, always=[19]
    )
    assert vocab.ids_V.tolist() == [5, 9, 19]
    assert coverage == pytest.approx(5 / 6)
    assert vocab.columns_T[[5, 9, 19, 7]].tolist() == [0, 1, 2, -1]


def test_training_learns_what_the_target_says(target: Target, tmp_path: Path) -> None:
    trainer = Trainer(config(60, learning_rate=3e-3), target, samples(), tmp_path)
    trainer.run()
    losses = [row["validation_loss"] for row in trainer.history]
    assert losses[-1] < losses[0]


class KilledError(Exception):
    pass


def test_a_killed_run_resumes_on_the_same_trajectory(target: Target, tmp_path: Path) -> None:
    whole = Trainer(config(12, pool=3), target, samples(), tmp_path / "whole")
    whole.run()

    def kill(report: StepReport) -> None:
        if report.step == 7:
            raise KilledError

    with pytest.raises(KilledError):
        Trainer(config(12, pool=3), target, samples(), tmp_path / "cut").run(kill)
    resumed = Trainer(config(12, pool=3), target, samples(), tmp_path / "cut")
    resumed.run()
    for (name, a), b in zip(whole.drafter.state_dict().items(), resumed.drafter.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    assert [r["validation_loss"] for r in resumed.history] == [r["validation_loss"] for r in whole.history]


def test_a_half_written_checkpoint_is_never_seen(target: Target, tmp_path: Path) -> None:
    trainer = Trainer(config(4), target, samples(), tmp_path)
    trainer.run()
    partial = tmp_path / "checkpoints" / ".partial-0000009"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == "step-0000004"


def test_a_nan_loss_stops_the_run_and_keeps_the_checkpoint(target: Target, tmp_path: Path) -> None:
    trainer = Trainer(config(8), target, samples(), tmp_path)

    def poison(report: StepReport) -> None:
        if report.step == 4:
            trainer.drafter.fc.weight.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match="finite"):
        trainer.run(poison)
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    state = json.loads((newest / "state.json").read_text())
    assert 0 < state["step"] <= 4


def test_too_few_samples_and_wrong_layers_are_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        Trainer(config(4), target, samples(1), tmp_path)
    wrong = config(4).model_copy(update={"drafter": config(4).drafter.model_copy(update={"target_layer_ids": (0, 3)})})
    with pytest.raises(OptionError, match="target_layer_ids"):
        Trainer(wrong, target, samples(), tmp_path)


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    optim = OptimConfig(steps=100, warmup_share=0.1, learning_rate=1.0)
    rates = [learning_rate(optim, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_recipes_are_validated(tmp_path: Path) -> None:
    assert load_recipe(DEMO_RECIPE).drafter.block_size >= 1
    bad = tmp_path / "r.json"
    text = json.loads(DEMO_RECIPE.read_text())
    text["optim"]["learning_rat"] = 1
    bad.write_text(json.dumps(text))
    with pytest.raises(OptionError, match="learning_rat"):
        load_recipe(bad)
    with pytest.raises(DsparkError):
        load_recipe(tmp_path / "missing.json")
