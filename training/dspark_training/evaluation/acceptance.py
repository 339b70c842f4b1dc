"""Which drafts the target keeps, and the token that follows them.

Shapes: B rows, K drafts, J = K + 1 target rows (row k is the target's word on draft k, the last one on the bonus
token), V the target's vocabulary, U the draft vocabulary.
Source: Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1; the DSpark paper (arXiv 2607.05147), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Proposal(NamedTuple):
    """A block of drafts."""

    tokens_BK: Tensor  # ids of the target's vocabulary
    probs_BKU: Tensor | None  # what each token was drawn from, fp32; None where the drafts are greedy
    ids_U: Tensor  # token id of each column
    confidence_BK: Tensor | None  # probability that draft k survives, given that those before it did


class Verdict(NamedTuple):
    """What became of a block."""

    accepted_B: Tensor  # drafts kept, 0..K
    next_B: Tensor  # the bonus token, or what replaces the first rejected draft


class Draws:
    """Uniform numbers, a stream a request: an answer does not depend on what it is batched with."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def take(self, count: int) -> Tensor:
        """The next [B, count] numbers in [0, 1), double precision."""
        return torch.stack([torch.rand(count, generator=g, dtype=torch.double) for g in self._generators])

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every stream that is not in `rows`."""
        self._generators = [self._generators[row] for row in rows]


def draw(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """A column of each row, [B], in proportion to its weight (inverse of the distribution function)."""
    cumulative_BV = weights_BV.double().cumsum(-1)
    points_B1 = (uniform_B.to(weights_BV.device) * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, points_B1, right=True)[:, 0].clamp_max(weights_BV.shape[1] - 1)


def accept_greedy(proposal: Proposal, logits_BJV: Tensor) -> Verdict:
    """Keep drafts while they are the target's best token."""
    best_BJ = logits_BJV.argmax(-1)
    agrees_BK = proposal.tokens_BK == best_BJ[:, :-1]
    accepted_B = agrees_BK.long().cumprod(-1).sum(-1)
    return Verdict(accepted_B, best_BJ.gather(1, accepted_B[:, None])[:, 0])


def accept_sampled(proposal: Proposal, logits_BJV: Tensor, temperature: float, uniform_BJ: Tensor) -> Verdict:
    """The rejection rule: draft k is kept with probability min(1, p_target / p_draft), else drawn from what is left.

    Args:
        proposal: with the distributions that its tokens were drawn from.
        logits_BJV: of the target, fp32.
        temperature: above 0.
        uniform_BJ: numbers in [0, 1); the last column draws the token after the kept drafts.

    Raises:
        ValueError: the proposal has no distributions.
    """
    if proposal.probs_BKU is None:
        raise ValueError("the rejection rule needs the distributions that the drafts were drawn from")
    n_drafts = proposal.tokens_BK.shape[1]
    target_BJV = torch.softmax(logits_BJV / temperature, dim=-1)
    # Drafts come from the columns, so every one of them is found there.
    columns_BK = torch.searchsorted(proposal.ids_U, proposal.tokens_BK.contiguous())
    ours_BK = proposal.probs_BKU.gather(2, columns_BK[..., None])[..., 0]
    theirs_BK = target_BJV[:, :-1].gather(2, proposal.tokens_BK[..., None])[..., 0]
    kept_BK = uniform_BJ[:, :-1].to(ours_BK.device) * ours_BK < theirs_BK
    accepted_B = kept_BK.long().cumprod(-1).sum(-1)

    rows_B = torch.arange(len(accepted_B), device=accepted_B.device)
    left_BV = target_BJV[rows_B, accepted_B]
    rejected_R = (accepted_B < n_drafts).nonzero()[:, 0]
    if len(rejected_R):
        draft_RU = proposal.probs_BKU[rejected_R, accepted_B[rejected_R]]
        residual_RV = left_BV[rejected_R].index_add(1, proposal.ids_U, draft_RU, alpha=-1).clamp_min(0)
        # Rounding can leave nothing where both distributions are equal.
        empty_R = residual_RV.sum(-1) <= 0
        residual_RV[empty_R] = left_BV[rejected_R][empty_R]
        left_BV[rejected_R] = residual_RV
    return Verdict(accepted_B, draw(left_BV, uniform_BJ[:, -1]))
