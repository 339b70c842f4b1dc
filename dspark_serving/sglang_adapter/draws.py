"""Drawing a block of tokens step by step, and keeping the distributions that they were drawn from.

Legend of shape suffixes: B requests, G drafted tokens a request, V vocabulary or what the drafter may propose of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.speculative.dspark_components.dspark_draft import DraftBlockResult, DraftParams

from dspark_serving.scheduler.survival_map import draft_statistics


class SampledBlock(DraftBlockResult, frozen=True):  # type: ignore[call-arg]  # a msgspec.Struct, not typed here
    """A drafted block that carries the distributions its tokens were drawn from."""

    draft_probs: torch.Tensor | None = None
    """[B, gamma, V] fp32; rejection must use these and nothing recomputed (DeepSpec issue 31)."""


class Chain(NamedTuple):
    """Tokens drafted for B requests."""

    tokens_BG: torch.Tensor
    probs_BGV: torch.Tensor | None
    """Distributions over the full vocabulary; None when every request is greedy."""
    statistics_BG3: torch.Tensor | None
    """Of the distributions, where they were asked for (scheduler/survival_map.py)."""


class Draws:
    """The draws of one block.

    Args:
        temperatures_B: of each request, above 0.
        greedy_B: requests that take the most probable token at every step.
        vocab_size: size of the full vocabulary.
        token_ids: the ids that the columns of the logits stand for, ascending; None for the whole vocabulary.
        judged: whether statistics of the distributions are wanted.
    """

    def __init__(
        self,
        temperatures_B: torch.Tensor,
        greedy_B: torch.Tensor,
        vocab_size: int,
        token_ids: torch.Tensor | None,
        *,
        judged: bool,
    ) -> None:
        self._temperatures_B = torch.where(greedy_B, 1.0, temperatures_B)
        self._judged = judged
        self._greedy_B = greedy_B
        self._all_greedy = bool(greedy_B.all())
        self._vocab_size = vocab_size
        self._token_ids = token_ids
        self._tokens: list[torch.Tensor] = []
        self._probs: list[torch.Tensor] = []
        self._statistics: list[torch.Tensor] = []

    def draw(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The next token of each request [B], from fp32 logits: p = softmax(logits / T).

        The tensor is the block's own: ranks that drew differently are made to agree by writing into it.
        """
        index_B = logits_BV.argmax(dim=1)
        if not self._all_greedy:
            logits_BV = logits_BV / self._temperatures_B[:, None]
            self._probs.append(logits_BV.softmax(dim=1))
        if self._judged:  # before the draw: what was drawn must not be told
            probability_BV = None if self._all_greedy else self._probs[-1]
            self._statistics.append(draft_statistics(logits_BV, probability_BV, self._vocab_size))
        if not self._all_greedy:
            drawn_B = torch.multinomial(self._probs[-1], 1).squeeze(1)
            index_B = torch.where(self._greedy_B, index_B, drawn_B)
        self._tokens.append(index_B if self._token_ids is None else self._token_ids[index_B])
        return self._tokens[-1]

    def chain(self) -> Chain:
        """The block so far."""
        return Chain(
            torch.stack(self._tokens, dim=1),
            None if self._all_greedy else self._full_probs(),
            torch.stack(self._statistics, dim=1) if self._judged else None,
        )

    def _full_probs(self) -> torch.Tensor:
        probs_BGV = torch.stack(self._probs, dim=1)
        if self._token_ids is None:
            return probs_BGV
        full_BGV = probs_BGV.new_zeros(*probs_BGV.shape[:2], self._vocab_size)
        full_BGV[..., self._token_ids] = probs_BGV
        return full_BGV


def sampled_block(chain: Chain, params: DraftParams) -> SampledBlock:
    """A drafted chain in the form that SGLang's verification takes."""
    return SampledBlock(
        draft_tokens=chain.tokens_BG,
        corrected_logits=None,
        greedy_mask=params.greedy_mask,
        temperatures=params.temperatures,
        greedy_draft=chain.probs_BGV is None,
        draft_probs=chain.probs_BGV,
    )


def sampled_probabilities(original: Any, draft_block: DraftBlockResult, vocab: int, device: Any) -> torch.Tensor:
    """Around SGLang's `_draft_probs`: a block sampled here brings the very distributions it was drawn from."""
    if isinstance(draft_block, SampledBlock) and draft_block.draft_probs is not None:
        return draft_block.draft_probs
    return original(draft_block, vocab, device)
