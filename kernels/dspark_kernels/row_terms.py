"""What rows of draft logits are worth against rows of target logits, and the gradient in their place.

Shapes: C rows, U target rows behind them (several draft rows may share one), V draft vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_V = 4096


class Chunk(NamedTuple):
    """Some rows, all tensors contiguous and of one floating-point type."""

    logits_CV: Tensor  # of the draft; becomes its gradient
    target_UV: Tensor  # logits of the target
    normaliser_U: Tensor  # log sum exp over the target's whole vocabulary; inf counts as no mass at all
    owner_C: Tensor  # int64: row of `target_UV`
    labels_C: Tensor  # int64: column of the label, -1 outside
    weights_3C: Tensor  # of cross-entropy, L1 and soft cross-entropy


def row_terms(chunk: Chunk, gradient: bool) -> tuple[Tensor, Tensor]:
    """Terms [3, C] in the order of the weights, and the draft's greedy columns [C].

    With q the draft's and p the target's probabilities: -log q[label], or 0 without a label; sum |q - p| and p's mass
    outside; -sum p log q. With `gradient`, the gradient of their weighted sum takes the place of the draft logits.
    """
    return (row_terms_triton if chunk.logits_CV.is_cuda else row_terms_torch)(chunk, gradient)


def row_terms_torch(chunk: Chunk, gradient: bool) -> tuple[Tensor, Tensor]:
    """The reference: see `row_terms`."""
    target_UV = (chunk.target_UV - chunk.normaliser_U[:, None]).exp_()
    mass_C = target_UV.sum(-1)[chunk.owner_C]
    target_CV = target_UV[chunk.owner_C]
    top_C = chunk.logits_CV.argmax(-1)
    log_draft_CV = chunk.logits_CV.log_softmax(-1)
    known_C, labels_C1 = chunk.labels_C >= 0, chunk.labels_C.clamp_min(0)[:, None]
    ce_C = torch.where(known_C, -log_draft_CV.gather(1, labels_C1)[:, 0], 0.0)
    soft_ce_C = -torch.linalg.vecdot(target_CV, log_draft_CV)
    draft_CV = log_draft_CV.exp_()
    difference_CV = draft_CV - target_CV
    l1_C = difference_CV.abs().sum(-1) + (1 - mass_C).clamp_min(0)
    if gradient:
        ce_weight_C1, l1_weight_C1, soft_weight_C1 = chunk.weights_3C[:, :, None]
        ce_weight_C1 = ce_weight_C1 * known_C[:, None]
        sign_CV = difference_CV.sign_()
        pull_C1 = torch.linalg.vecdot(sign_CV, draft_CV)[:, None]
        constant_C1 = ce_weight_C1 - l1_weight_C1 * pull_C1 + soft_weight_C1 * mass_C[:, None]
        torch.mul(draft_CV, sign_CV.mul_(l1_weight_C1).add_(constant_C1), out=chunk.logits_CV)
        chunk.logits_CV.sub_(target_CV.mul_(soft_weight_C1)).scatter_add_(1, labels_C1, -ce_weight_C1)
    return torch.stack([ce_C, l1_C, soft_ce_C]), top_C


def row_terms_triton(chunk: Chunk, gradient: bool) -> tuple[Tensor, Tensor]:
    """One program a row, which reads its logits three times: see `row_terms`."""
    rows, vocabulary = chunk.logits_CV.shape
    terms_3C = torch.empty_like(chunk.weights_3C)
    top_C = torch.empty_like(chunk.labels_C)
    _row_terms_kernel[(rows,)](
        *chunk,
        terms_3C,
        top_C,
        C=rows,
        V=vocabulary,
        GRADIENT=gradient,
        BLOCK_V=min(_BLOCK_V, triton.next_power_of_2(vocabulary)),
        num_warps=8,
    )
    return terms_3C, top_C


@triton.jit
def _row_terms_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    target_ptr,
    normaliser_ptr,
    owner_ptr,
    labels_ptr,
    weights_ptr,
    terms_ptr,
    top_ptr,
    C,
    V,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    owner = tl.load(owner_ptr + row)
    label = tl.load(labels_ptr + row)
    normaliser = tl.load(normaliser_ptr + owner)
    draft_ptr = logits_ptr + row * V
    target_ptr += owner * V
    column = tl.arange(0, BLOCK_V)

    # The draft's log sum exp, online, and its greedy column: of equal logits the first.
    highest = tl.full([], float("-inf"), tl.float32)
    scaled_sum = tl.full([], 0.0, tl.float32)
    top = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK_V):
        draft = tl.load(draft_ptr + start + column, mask=start + column < V, other=float("-inf")).to(tl.float32)
        tile_highest = tl.max(draft, axis=0)
        top = tl.where(tile_highest > highest, start + tl.argmax(draft, axis=0), top)
        higher = tl.maximum(highest, tile_highest)
        scaled_sum = scaled_sum * tl.exp(highest - higher) + tl.sum(tl.exp(draft - higher), axis=0)
        highest = higher
    log_sum = highest + tl.log(scaled_sum)

    distance = tl.zeros([BLOCK_V], tl.float32)
    mass = tl.zeros([BLOCK_V], tl.float32)
    cross = tl.zeros([BLOCK_V], tl.float32)
    pull = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        inside = start + column < V
        log_q = tl.load(draft_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32) - log_sum
        target = tl.load(target_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        q, p = tl.exp(log_q), tl.exp(target - normaliser)
        distance += tl.abs(q - p)
        mass += p
        cross -= tl.where(p > 0.0, p * log_q, 0.0)
        pull += tl.where(q > p, q, tl.where(q < p, -q, 0.0))
    total_mass = tl.sum(mass, axis=0)
    known = label >= 0
    label_logit = tl.load(draft_ptr + tl.maximum(label, 0)).to(tl.float32)
    l1 = tl.sum(distance, axis=0) + tl.maximum(1.0 - total_mass, 0.0)
    tl.store(terms_ptr + row, tl.where(known, log_sum - label_logit, 0.0))
    tl.store(terms_ptr + C + row, l1)
    tl.store(terms_ptr + 2 * C + row, tl.sum(cross, axis=0))
    tl.store(top_ptr + row, top)

    if GRADIENT:
        ce_weight = tl.where(known, tl.load(weights_ptr + row), 0.0).to(tl.float32)
        l1_weight = tl.load(weights_ptr + C + row).to(tl.float32)
        soft_weight = tl.load(weights_ptr + 2 * C + row).to(tl.float32)
        constant = ce_weight - l1_weight * tl.sum(pull, axis=0) + soft_weight * total_mass
        # Every lane has read what it overwrites, but the label's logit was read by all of them.
        tl.debug_barrier()
        for start in range(0, V, BLOCK_V):
            inside = start + column < V
            log_q = tl.load(draft_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32) - log_sum
            target = tl.load(target_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32)
            q, p = tl.exp(log_q), tl.exp(target - normaliser)
            sign = tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
            slope = q * (sign * l1_weight + constant) - soft_weight * p
            slope -= tl.where(start + column == label, ce_weight, 0.0)
            tl.store(draft_ptr + start + column, slope, mask=inside)
