"""The DSpark objective (DeepSpec): cross-entropy, full L1 to the target, and confidence, weighted by position.

Rows N are (anchor, position) pairs; V is the draft vocabulary, a subset of the target's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from dspark_kernels.vocabulary_loss import DraftRows, RowWeights, TargetRows, vocabulary_loss
from torch import Tensor


class Weights(NamedTuple):
    """Weights of the three terms."""

    ce: float
    l1: float
    confidence: float


class Losses(NamedTuple):
    """Means over weighted rows, and what a row's draft is worth."""

    total: Tensor
    ce: Tensor
    l1: Tensor
    confidence: Tensor
    acceptance_N: Tensor  # 1 - L1 / 2: probability that a sampled draft token is accepted (no gradient)
    agrees_N: Tensor  # greedy draft token equals greedy target token


def position_weights(valid_NK: Tensor, decay: float) -> Tensor:
    """w_k = exp(-k / decay) on the supervised prefix of each block, else 0.

    Args:
        valid_NK: 1 where the label of row k is supervised, contiguous from k = 0.
    """
    steps = torch.arange(valid_NK.shape[-1], device=valid_NK.device)
    return valid_NK.float() * torch.exp(-steps / decay)


def dspark_losses(
    draft: DraftRows,
    target: TargetRows,
    target_top_N: Tensor,
    labels_N: Tensor,
    confidence_N: Tensor | None,
    row_weights_N: Tensor,
    weights: Weights,
) -> Losses:
    """The objective over rows.

    Args:
        draft: the draft's logits in factors: base logits plus Markov bias.
        target: the target's probabilities of the draft vocabulary in factors; the rest of its mass lies outside.
        target_top_N: index of the target's greedy token in the draft vocabulary, -1 if it lies outside.
        labels_N: index of the label in the draft vocabulary, -1 if it lies outside (then no cross-entropy).
        confidence_N: confidence logits; None for a drafter without that head, whose term is 0.
        row_weights_N: from position_weights.
    """
    ce_shares_N, l1_shares_N = shares_of(row_weights_N * (labels_N >= 0)), shares_of(row_weights_N)
    shares = RowWeights(ce_N=weights.ce * ce_shares_N, l1_N=weights.l1 * l1_shares_N)
    total, rows = vocabulary_loss(draft, target, labels_N, shares)
    acceptance_N = (1.0 - 0.5 * rows.l1_N).clamp(0.0, 1.0)
    confidence = total.new_zeros(())
    if confidence_N is not None:
        losses_N = F.binary_cross_entropy_with_logits(confidence_N.float(), acceptance_N, reduction="none")
        confidence = (losses_N * l1_shares_N).sum()
    return Losses(
        total + weights.confidence * confidence,
        (rows.ce_N * ce_shares_N).sum(),
        (rows.l1_N * l1_shares_N).sum(),
        confidence.detach(),
        acceptance_N,
        rows.top_N == target_top_N,
    )


def shares_of(weights_N: Tensor) -> Tensor:
    """Weights of a weighted mean."""
    return weights_N / weights_N.sum().clamp_min(1e-6)
