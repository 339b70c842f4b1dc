"""The DSpark objective (DeepSpec): cross-entropy, full L1 to the target, and confidence, weighted by position.

Rows N are (anchor, position) pairs; V is the draft vocabulary, a subset of the target's. Everything in fp32:
bf16 divergences give gradients 19-31 % off near acceptance 0.98 (speculators PR 788).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    draft_logits_NV: Tensor,
    target_probs_NV: Tensor,
    target_top_N: Tensor,
    labels_N: Tensor,
    confidence_N: Tensor | None,
    row_weights_N: Tensor,
    weights: Weights,
) -> Losses:
    """The objective over rows.

    Args:
        draft_logits_NV: base logits plus Markov bias.
        target_probs_NV: the target's probabilities of the draft vocabulary; the rest of its mass lies outside.
        target_top_N: index of the target's greedy token in the draft vocabulary, -1 if it lies outside.
        labels_N: index of the label in the draft vocabulary, -1 if it lies outside (then no cross-entropy).
        confidence_N: confidence logits; None for a drafter without that head, whose term is 0.
        row_weights_N: from position_weights.
    """
    log_probs_NV = torch.log_softmax(draft_logits_NV.float(), dim=-1)
    known_N = labels_N >= 0
    ce_N = F.nll_loss(log_probs_NV, labels_N.clamp_min(0), reduction="none")
    outside_N = (1.0 - target_probs_NV.sum(-1)).clamp_min(0.0)
    l1_N = (log_probs_NV.exp() - target_probs_NV).abs().sum(-1) + outside_N
    acceptance_N = (1.0 - 0.5 * l1_N.detach()).clamp(0.0, 1.0)
    ce = _weighted_mean(ce_N, row_weights_N * known_N)
    l1 = _weighted_mean(l1_N, row_weights_N)
    confidence = l1.new_zeros(())
    if confidence_N is not None:
        losses_N = F.binary_cross_entropy_with_logits(confidence_N.float(), acceptance_N, reduction="none")
        confidence = _weighted_mean(losses_N, row_weights_N)
    agrees_N = draft_logits_NV.argmax(-1) == target_top_N
    total = weights.ce * ce + weights.l1 * l1 + weights.confidence * confidence
    return Losses(total, ce.detach(), l1.detach(), confidence.detach(), acceptance_N, agrees_N)


def _weighted_mean(values_N: Tensor, weights_N: Tensor) -> Tensor:
    return (values_N * weights_N).sum() / weights_N.sum().clamp_min(1e-6)
