"""The objective against the published formula written out in loops, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from dspark_kernels.vocabulary_loss import DraftRows, TargetRows
from dspark_training.objectives.losses import Losses, Weights, dspark_losses, position_weights
from torch import Tensor

WEIGHTS = Weights(ce=0.1, l1=0.9, confidence=1.0)


def by_hand(
    logits: Tensor,
    probs: Tensor,
    labels: list[int],
    confidence: list[float],
    weights: list[float],
    w: Weights = WEIGHTS,
) -> float:
    """Sums over rows exactly as the notes state them (w_k CE, full L1, BCE against 1 - L1 / 2)."""
    ce_sum = l1_sum = conf_sum = known = total = 0.0
    for row, p, label, c, weight in zip(logits, probs, labels, confidence, weights, strict=True):
        q = torch.softmax(row.double(), -1)
        l1 = float((q - p.double()).abs().sum() + (1 - p.double().sum()))
        chance = 1 / (1 + math.exp(-c))
        accept = 1 - l1 / 2
        if label >= 0:
            ce_sum += weight * -math.log(float(q[label]))
            known += weight
        l1_sum += weight * l1
        conf_sum += weight * -(accept * math.log(chance) + (1 - accept) * math.log(1 - chance))
        total += weight
    return w.ce * ce_sum / known + w.l1 * l1_sum / total + w.confidence * conf_sum / total


def rows(
    n: int = 12, vocab: int = 9, mass: float = 0.9, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab, generator=g) * 2
    probs = torch.softmax(torch.randn(n, vocab, generator=g), -1) * mass
    labels = torch.randint(-1, vocab, (n,), generator=g)
    confidence = torch.randn(n, generator=g)
    weights = torch.rand(n, generator=g) + 0.1
    return logits, probs, labels, confidence, weights


def losses(logits: Tensor, probs: Tensor, *rest: Tensor | Weights) -> Losses:
    """The objective of given logits and probabilities: heads that are identities."""
    same_VV = torch.eye(logits.shape[1])
    target = TargetRows(probs.log(), same_VV, torch.zeros(len(probs)), torch.arange(len(probs)))
    return dspark_losses(DraftRows(logits, same_VV), target, *rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("mass", [1.0, 0.8])
def test_equals_the_formula_written_out(mass: float) -> None:
    logits, probs, labels, confidence, weights = rows(mass=mass)
    got = losses(logits, probs, probs.argmax(-1), labels, confidence, weights, WEIGHTS)
    want = by_hand(logits, probs, labels.tolist(), confidence.tolist(), weights.tolist())
    assert got.total.item() == pytest.approx(want, rel=1e-5)


def test_rows_without_weight_change_nothing() -> None:
    logits, probs, labels, confidence, weights = rows()
    weights[5:] = 0
    full = losses(logits, probs, probs.argmax(-1), labels, confidence, weights, WEIGHTS)
    cut = losses(logits[:5], probs[:5], probs[:5].argmax(-1), labels[:5], confidence[:5], weights[:5], WEIGHTS)
    assert full.total.item() == pytest.approx(cut.total.item(), rel=1e-6)


def test_gradient_equals_finite_differences() -> None:
    logits, probs, labels, confidence, weights = rows(n=3, vocab=5)
    logits.requires_grad_()
    losses(
        logits, probs, probs.argmax(-1), labels, confidence, weights, WEIGHTS._replace(confidence=0)
    ).total.backward()
    step = 1e-3
    for i, j in ((0, 0), (1, 3), (2, 4)):
        moved = []
        for sign in (1, -1):
            shifted = logits.detach().clone()
            shifted[i, j] += sign * step
            moved.append(
                by_hand(
                    shifted,
                    probs,
                    labels.tolist(),
                    confidence.tolist(),
                    weights.tolist(),
                    WEIGHTS._replace(confidence=0),
                )
            )
        assert logits.grad is not None
        assert logits.grad[i, j].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=2e-4)


def test_confidence_target_carries_no_gradient_into_the_draft() -> None:
    logits, probs, labels, confidence, weights = rows()
    logits.requires_grad_()
    only_confidence = Weights(0.0, 0.0, 1.0)
    losses(
        logits, probs, probs.argmax(-1), labels, confidence.requires_grad_(), weights, only_confidence
    ).total.backward()
    assert logits.grad is None or not logits.grad.any()
    assert confidence.grad is not None
    assert confidence.grad.any()


def test_position_weights_decay_and_mask() -> None:
    valid = torch.tensor([[True, True, True], [True, False, False]])
    got = position_weights(valid, decay=4.0)
    want = torch.tensor([[1.0, math.exp(-0.25), math.exp(-0.5)], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(got, want)


def test_greedy_agreement_counts_targets_outside_the_draft_vocabulary_as_missed() -> None:
    logits, probs, labels, confidence, weights = rows()
    top = logits.argmax(-1)
    assert losses(logits, probs, top, labels, confidence, weights, WEIGHTS).agrees_N.all()
    outside = torch.full_like(top, -1)
    assert not losses(logits, probs, outside, labels, confidence, weights, WEIGHTS).agrees_N.any()
