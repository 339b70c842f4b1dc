"""Generation, storage and the training loop: equal to transformers, resumable, nothing lost."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dspark_training import checkpoint
from dspark_training.batches import pools
from dspark_training.config import DataConfig, DrafterShape, FeaturesConfig, OptimConfig, RunConfig
from dspark_training.data.blocks import cut_blocks, draw_anchors, pad
from dspark_training.data.generate import Request, complete
from dspark_training.data.store import Sample, SampleStore
from dspark_training.data.vocab import DraftVocab
from dspark_training.evaluation.validation import Validation
from dspark_training.features.compress import CodecName
from dspark_training.optimizer import learning_rate
from dspark_training.target import Target
from dspark_training.trainer import StepReport, Trainer, TrainingError, _Step

from dspark_serving.errors import DataError, OptionError
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


def config(steps: int, learning_rate: float = 1e-3, pool: int = 1, **optim: Any) -> RunConfig:
    return RunConfig(
        data=DataConfig(prompts=(), validation_share=0.2),
        drafter=DrafterShape(
            target_layer_ids=(0, 2), mask_token_id=3, block_size=3, markov_rank=4, draft_vocab_size=128
        ),
        optim=OptimConfig(steps=steps, sequences=2, anchors=4, learning_rate=learning_rate, pool=pool, **optim),
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


@pytest.mark.parametrize(
    "optim", [{"pool": 3}, {"pool": 4, "micro_batches": 2, "optimizer": "muon", "ema_decay": 0.8}], ids=["plain", "all"]
)
def test_a_killed_run_resumes_on_the_same_trajectory(target: Target, tmp_path: Path, optim: dict[str, Any]) -> None:
    told = config(12, **optim)
    whole = Trainer(told, target, samples(), tmp_path / "whole")
    whole.run()

    def kill(report: StepReport) -> None:
        if report.step == 7:
            raise KilledError

    with pytest.raises(KilledError):
        Trainer(told, target, samples(), tmp_path / "cut").run(kill)
    resumed = Trainer(told, target, samples(), tmp_path / "cut")
    resumed.run()
    for (name, a), b in zip(whole.drafter.state_dict().items(), resumed.drafter.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    assert [r["validation_loss"] for r in resumed.history] == [r["validation_loss"] for r in whole.history]


def test_gradients_of_micro_batches_add_up_to_those_of_one_batch(target: Target, tmp_path: Path) -> None:
    """Two equal micro-batches are the batch itself, whatever clipping and Adam make of it."""
    one = Trainer(config(2, pool=1), target, samples(), tmp_path / "one")
    two = Trainer(config(2, pool=2, micro_batches=2), target, samples(), tmp_path / "two")
    draws = next(pools(one.train_samples, one.config.optim, 7, 0)).steps[0]
    losses = [trainer._optimizer_step(_Step(trainer.objective), draws * n, {}) for trainer, n in [(one, 1), (two, 2)]]
    assert losses[0] == pytest.approx(losses[1])
    for a, b in zip(one.drafter.parameters(), two.drafter.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_patience_ends_a_run_with_the_best_weights(target: Target, tmp_path: Path) -> None:
    trainer = Trainer(config(400, 0.3, patience=2), target, samples(), tmp_path)  # far too large a rate: gets worse
    trainer.run()
    lengths = [row["accepted_length"] for row in trainer.history]
    assert trainer.step < 400
    assert len(lengths) == lengths.index(max(lengths)) + 3
    measured = Validation(trainer.validation_samples, trainer.source, trainer.vocab)
    best = trainer.history[lengths.index(max(lengths))]
    assert measured.run(trainer.objective, 3)["validation_loss"] == pytest.approx(best["validation_loss"])
    again = Trainer(config(400, 0.3, patience=2), target, samples(), tmp_path)
    again.run()
    assert again.step == trainer.step, "a finished run stays finished"


def test_averaged_weights_are_the_weighted_mean_of_the_steps(target: Target, tmp_path: Path) -> None:
    trainer = Trainer(config(4, ema_decay=0.2), target, samples(), tmp_path)
    seen = [trainer.drafter.fc.weight.detach().clone()]
    trainer.run(lambda report: seen.append(trainer.drafter.fc.weight.detach().clone()))
    expected = seen[0]
    for step, weights in enumerate(seen[1:], start=1):
        decay = min(0.2, step / (step + 10))
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(trainer.drafter.fc.weight.detach(), expected)
    assert not torch.equal(expected, seen[-1])


def test_muon_takes_the_matrices_of_the_layers_and_learns(target: Target, tmp_path: Path) -> None:
    trainer = Trainer(config(40, 3e-3, optimizer="muon"), target, samples(), tmp_path)
    adamw, muon = trainer.optimizers
    names = {id(p): name for name, p in trainer.drafter.named_parameters()}
    inner = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert {"fc.weight", "layers.1.mlp.up_proj.weight", "layers.0.self_attn.q_proj.weight"} <= inner
    assert not any("norm" in name or "markov" in name or "confidence" in name for name in inner)
    others = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert inner | others == set(names.values())
    assert not inner & others
    trainer.run()
    losses = [row["validation_loss"] for row in trainer.history]
    assert losses[-1] < losses[0]


def test_data_without_a_token_to_predict_stop_the_run(target: Target, tmp_path: Path) -> None:
    rows = samples()  # in the order of their keys, so that the first fifth is held out
    rows = rows[:5] + [s._replace(spans=[(3, 4)]) for s in rows[5:]]
    with pytest.raises(TrainingError, match="no token to predict"):
        Trainer(config(4), target, rows, tmp_path).run()


def test_held_out_answers_without_a_token_to_judge_are_named_before_the_first_step(
    target: Target, tmp_path: Path
) -> None:
    rows = samples()  # in the order of their keys, so that the first fifth is held out
    short = [s._replace(spans=[(3, 5)]) for s in rows[:5]] + rows[5:]
    judged = Trainer(config(5), target, short, tmp_path / "two")
    judged.run()
    assert judged.history[-1]["accepted_length"] >= 1
    with pytest.raises(DataError, match="none of the 5 held-out samples"):
        Trainer(config(5), target, [s._replace(spans=[(3, 4)]) for s in rows[:5]] + rows[5:], tmp_path / "one").run()


@pytest.mark.parametrize("codec", ["int8", "int3"])
def test_training_from_a_cache_follows_the_online_run_and_resumes_exactly(
    target: Target, tmp_path: Path, codec: CodecName
) -> None:
    def run(name: str, features: FeaturesConfig, on_step: Callable[[StepReport], None] = lambda r: None) -> Trainer:
        trainer = Trainer(
            config(40, 3e-3).model_copy(update={"features": features}), target, samples(), tmp_path / name
        )
        trainer.run(on_step)
        return trainer

    def kill(report: StepReport) -> None:
        if report.step == 27:
            raise KilledError

    cached = FeaturesConfig(source="cached", codec=codec, cap_gb=0.01)
    online, whole = run("online", FeaturesConfig()), run("whole", cached)
    with pytest.raises(KilledError):
        run("cut", cached, kill)
    resumed = run("cut", cached)
    for (name, a), b in zip(whole.drafter.state_dict().items(), resumed.drafter.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    losses = {t: [row["validation_loss"] for row in t.history] for t in (online, whole)}
    fallen = losses[online][0] - losses[online][-1]
    apart = max(abs(a - b) for a, b in zip(losses[online], losses[whole], strict=True))
    assert 0 < apart < (0.05 if codec == "int8" else 0.15) * fallen
    assert whole.history[-1]["cache_misses"] == len(samples()), "each sample is computed once"
    assert whole.history[-1]["cache_hits"] > 0


def test_a_half_written_checkpoint_is_never_seen(target: Target, tmp_path: Path) -> None:
    trainer = Trainer(config(4), target, samples(), tmp_path)
    trainer.run()
    partial = tmp_path / "checkpoints" / ".partial-0000009"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == "step-0000004"


def test_too_few_samples_foreign_ids_and_wrong_layers_are_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        Trainer(config(4), target, samples(1), tmp_path)
    foreign = [*samples(), samples()[0]._replace(key="far", ids=[*samples()[0].ids, target.config.vocab_size])]
    with pytest.raises(DataError, match="the sample far holds the token id 512; expected ids below 512"):
        Trainer(config(4), target, foreign, tmp_path)
    wrong = config(4).model_copy(update={"drafter": config(4).drafter.model_copy(update={"target_layer_ids": (0, 3)})})
    with pytest.raises(OptionError, match="target_layer_ids"):
        Trainer(wrong, target, samples(), tmp_path)
    wrong = config(4).model_copy(update={"drafter": config(4).drafter.model_copy(update={"init_layers": (1, 99)})})
    with pytest.raises(OptionError, match=r"init_layers \[99\].*from 0 to 3"):
        Trainer(wrong, target, samples(), tmp_path)


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    optim = OptimConfig(steps=100, warmup_share=0.1, learning_rate=1.0)
    rates = [learning_rate(optim, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
