"""The Eagle3 drafter and its objective against the served drafter's reference and training-time test written out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from dspark_training.config import OptimConfig
from dspark_training.data.blocks import Blocks, Sequences, cut_blocks, draw_anchors, pad
from dspark_training.data.store import Sample
from dspark_training.data.vocab import DraftVocab
from dspark_training.evaluation.walk import walk_drafter
from dspark_training.features.source import OnlineFeatures
from dspark_training.models.eagle3 import Eagle3Drafter
from dspark_training.models.layers import DrafterDims
from dspark_training.objectives.build import build_objective
from dspark_training.objectives.supervision import supervise
from dspark_training.target import Target
from torch import Tensor

from tests.eagle3_models import Drafter, make_eagle3, speculative_decode
from tests.tiny_models import VOCAB_SIZE, make_tiny_target
from tests.ttt_reference import STEPS, Ttt, looks_ahead, published_mask

PROMPT = [40, 41, 42, 70, 71, 40, 41, 42, 90]
LAYER_IDS = (0, 1, 2)
SOME_IDS = sorted(random.Random(3).sample(range(VOCAB_SIZE), 200))


class Tiny(NamedTuple):
    root: Path
    target: Target
    drafter: Eagle3Drafter


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    config = make_tiny_target(tmp_path / "target", "llama")
    weights = make_eagle3(tmp_path / "drafter", config)
    dims = DrafterDims(
        hidden_size=48,
        intermediate_size=64,
        num_layers=1,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        num_features=len(LAYER_IDS),
        vocab_size=VOCAB_SIZE,
        block_size=STEPS,
        mask_token_id=0,
        markov_rank=0,
        markov_head_type="none",
        confidence_head=False,
    )
    drafter = Eagle3Drafter(dims)
    drafter.load_state_dict(weights)
    return Tiny(tmp_path, Target.load(tmp_path / "target"), drafter)


def features_of(target: Target, ids: list[int]) -> Tensor:
    ids_BT = torch.tensor([ids])
    return target.features(ids_BT, torch.ones_like(ids_BT), LAYER_IDS).context_BTM


# The drafter


@torch.no_grad()
def test_it_drafts_what_the_served_drafters_reference_drafts(tiny: Tiny) -> None:
    _, target, drafter = tiny
    reference = Drafter.read(tiny.root / "drafter", target.model)
    for length in (2, 5, 9):
        ids = PROMPT[:length]
        features = features_of(target, ids)[:, :-1]
        want = reference.draft(ids, features[0])
        context = drafter.context(features, torch.tensor([ids[1:]]), torch.tensor([0]), target.embed)
        chain = drafter.begin(context, torch.tensor([[length - 1]]))
        token, probabilities = ids[-1], []
        tokens = []
        for _ in range(STEPS):
            hidden, chain = drafter.step(context.rows, chain, torch.tensor([[token]]), target.embed)
            probability, best = (hidden[0, 0] @ target.lm_head_weight_VD.T).softmax(-1).max(-1)
            token = int(best)
            tokens.append(token)
            probabilities.append(float(probability))
        assert tokens == want.tokens
        assert probabilities == pytest.approx(want.probabilities, rel=1e-4)


@torch.no_grad()
def test_a_chain_sees_features_before_its_anchor_and_its_own_tokens_only(tiny: Tiny) -> None:
    _, target, drafter = tiny
    anchor, ids = 4, torch.tensor([PROMPT])
    features, next_ids = features_of(target, PROMPT), ids.roll(-1, 1)
    previous = ids[:, None, anchor : anchor + STEPS]

    def run(features: Tensor = features, next_ids: Tensor = next_ids, previous: Tensor = previous) -> Tensor:
        return drafter(features, next_ids, torch.tensor([[anchor]]), previous, target.embed)

    base = run()
    later_features, later_ids, later_tokens = features.clone(), next_ids.clone(), previous.clone()
    later_features[:, anchor:] += 10.0
    later_ids[:, anchor:] = 7
    later_tokens[..., 2:] = 7  # x_2: rows 0 and 1 must not notice
    torch.testing.assert_close(run(features=later_features, next_ids=later_ids), base)
    torch.testing.assert_close(run(previous=later_tokens)[:, :, :2], base[:, :, :2])
    # Negative controls: what a chain must see.
    assert not torch.allclose(run(previous=later_tokens)[:, :, 2], base[:, :, 2])
    for position in (anchor - 1, anchor - 2, 0):
        seen = features.clone()
        seen[:, position] += 10.0
        assert not torch.allclose(run(features=seen), base)
    context_ids = next_ids.clone()
    context_ids[:, anchor - 2] = 7
    assert not torch.allclose(run(next_ids=context_ids), base)


@torch.no_grad()
def test_the_walk_equals_real_speculative_decoding(tiny: Tiny) -> None:
    _, target, drafter = tiny
    decoded = speculative_decode(Drafter.read(tiny.root / "drafter", target.model), target.model, PROMPT, 40)
    answer = decoded.tokens
    sample = Sample("x", "math", 0.0, PROMPT + answer, [(len(PROMPT), len(PROMPT) + len(answer))])
    vocab = DraftVocab(range(VOCAB_SIZE), VOCAB_SIZE)
    objective = build_objective("eagle3", drafter, target, vocab, OptimConfig(steps=1))
    got = walk_drafter(objective, OnlineFeatures(target, LAYER_IDS), [sample])[0].accepted
    at, inside = 0, []
    for n in decoded.accepted:
        at += n + 1
        if at < len(answer):
            inside.append(n)
    assert got[: len(inside)] == inside


# The objective


def batches(n: int) -> list[tuple[Sequences, list[list[int]], Blocks]]:
    """Two sequences of unequal length and some anchors, n times."""
    rng, made = random.Random(1), []
    for i in range(n):
        pair = []
        for b, length in enumerate((17, 12)):
            ids = [rng.randrange(VOCAB_SIZE) for _ in range(length)]
            pair.append(Sample(f"{i}-{b}", "math", 0.0, ids, [(4, length)]))
        sequences = pad(pair)
        anchors_BA = draw_anchors(sequences, 5, 1, rng)[0]
        made.append((sequences, [s.ids for s in pair], cut_blocks(sequences, anchors_BA, STEPS)))
    return made


def chosen(blocks: Blocks) -> list[list[int]]:
    """Positions of the real anchors of each sequence."""
    pairs = zip(blocks.anchors_BA, blocks.valid_BAK[..., 0], strict=True)
    return [anchors_A[valid_A].tolist() for anchors_A, valid_A in pairs]


@pytest.mark.parametrize("allowed", [list(range(VOCAB_SIZE)), SOME_IDS], ids=["whole", "reduced"])
def test_the_loss_curve_equals_training_time_test_written_out(tiny: Tiny, allowed: list[int]) -> None:
    _, target, drafter = tiny
    reference = Ttt(drafter.state_dict(), target.model, LAYER_IDS, allowed)
    objective = build_objective("eagle3", drafter, target, DraftVocab(allowed, VOCAB_SIZE), OptimConfig(steps=1))
    source = OnlineFeatures(target, LAYER_IDS)
    ours = torch.optim.SGD(drafter.parameters(), lr=0.05)
    theirs = torch.optim.SGD(reference.weights.values(), lr=0.05)
    curves: tuple[list[float], list[float]] = ([], [])
    for sequences, ids, blocks in batches(6):
        got = objective(supervise(source, sequences, objective.vocab), blocks).total
        want = reference.loss(ids, chosen(blocks))
        for optimizer, loss, curve in zip((ours, theirs), (got, want), curves, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    for name, parameter in drafter.named_parameters():
        torch.testing.assert_close(parameter, reference.weights[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_row_that_looks_ahead_is_caught(tiny: Tiny) -> None:
    """The comparison above tells the published mask from one that is off by a row."""
    _, target, drafter = tiny
    reference = Ttt(drafter.state_dict(), target.model, LAYER_IDS, list(range(VOCAB_SIZE)))
    _, ids, blocks = batches(1)[0]
    right, wrong = (reference.loss(ids, chosen(blocks), sees).item() for sees in (published_mask, looks_ahead))
    assert wrong != pytest.approx(right, rel=1e-3)


def test_rows_are_judged_one_by_one(tiny: Tiny) -> None:
    """Agreement and acceptance of each row, against full distributions of target and drafter."""
    _, target, drafter = tiny
    objective = build_objective("eagle3", drafter, target, DraftVocab(SOME_IDS, VOCAB_SIZE), OptimConfig(steps=1))
    sequences, ids, blocks = batches(1)[0]
    with torch.no_grad():
        losses = objective(supervise(OnlineFeatures(target, LAYER_IDS), sequences, objective.vocab), blocks)
        reference = Ttt(drafter.state_dict(), target.model, LAYER_IDS, SOME_IDS)
        head = target.lm_head_weight_VD[SOME_IDS]
        rows = iter(zip(losses.agrees_N.tolist(), losses.acceptance_N.tolist(), strict=True))
        for b, row in enumerate(ids):
            logits_T, features = reference.run_target(row)
            outputs = reference.passes(row, features, published_mask)
            for anchor, valid_K in zip(blocks.anchors_BA[b].tolist(), blocks.valid_BAK[b].tolist(), strict=True):
                for s, valid in enumerate(valid_K):
                    agrees, acceptance = next(rows)
                    if not valid:
                        continue
                    q = torch.zeros(VOCAB_SIZE)
                    q[SOME_IDS] = (head @ outputs[s][anchor - 1]).softmax(-1)
                    p = logits_T[anchor + s].softmax(-1)
                    assert acceptance == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-4)
                    assert agrees == (int(q.argmax()) == int(p.argmax()))


def test_an_anchor_without_a_row_before_it_counts_for_nothing(tiny: Tiny) -> None:
    _, target, drafter = tiny
    vocab = DraftVocab(range(VOCAB_SIZE), VOCAB_SIZE)
    objective = build_objective("eagle3", drafter, target, vocab, OptimConfig(steps=1))
    sequences = pad([Sample("a", "math", 0.0, PROMPT, [(0, len(PROMPT))])])
    supervision = supervise(OnlineFeatures(target, LAYER_IDS), sequences, vocab)
    alone, both = (
        objective(supervision, cut_blocks(sequences, torch.tensor([anchors]), STEPS)).total.item()
        for anchors in ([3], [0, 3])
    )
    assert both == pytest.approx(alone, rel=1e-5)


def test_an_objective_for_another_algorithm_is_refused(tiny: Tiny) -> None:
    vocab = DraftVocab(range(VOCAB_SIZE), VOCAB_SIZE)
    with pytest.raises(TypeError, match="Eagle3Drafter"):
        build_objective("dspark", tiny.drafter, tiny.target, vocab, OptimConfig(steps=1))
