"""Penalties on tokens that a request has put out already, row by row of a drafted block.

SGLang 0.5.23 computes one penalty a request before the round and never tells it what a DSPARK round accepted: with
speculation every penalty is silently off, and `min_new_tokens` suppresses the end for ever. Here each row of a block is
penalised for what precedes it: the request's output so far and the drafts before the row.

Legend of shape suffixes: B requests of the batch, R of them penalised, P places of the request pool, N rows a block
(the anchor's first), G = N - 1 drafts, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class _Round(NamedTuple):
    rows_R: torch.Tensor  # of the batch
    places_R: torch.Tensor  # of the pool


class Penalties:
    """Frequency, presence and repetition penalties and the least number of new tokens.

    Counts what penalised requests put out, on the device: under overlap the host does not know yet what the last round
    accepted.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._counts_PV: torch.Tensor | None = None
        self._round: _Round | None = None

    def begin(self, batch: Any) -> None:
        """Before a prefill: its requests start with what they put out before they were retracted, if they were."""
        for place, request in zip(batch.req_pool_indices_cpu.tolist(), batch.reqs, strict=True):
            if not is_penalised(request.sampling_params):
                continue
            if self._counts_PV is None:
                places = len(batch.req_to_token_pool.req_to_token)
                self._counts_PV = torch.zeros(places, self._vocab_size, dtype=torch.int32, device=batch.device)
            ids = torch.tensor(list(request.output_ids), dtype=torch.int64)
            self._counts_PV[place] = torch.bincount(ids, minlength=self._vocab_size).to(batch.device)

    def apply(self, batch: Any, ids_BN: torch.Tensor, logits_BNV: torch.Tensor) -> None:
        """Penalise the target's logits of a block in place; `ids_BN` holds the anchors and the drafts."""
        rows = [row for row, request in enumerate(batch.reqs) if is_penalised(request.sampling_params)]
        if not rows or self._counts_PV is None:
            self._round = None
            return
        rows_R = torch.tensor(rows, device=ids_BN.device)
        self._round = _Round(rows_R, batch.req_pool_indices[rows_R])
        ids_RN = ids_BN[rows_R]
        self._count(self._round.places_R, ids_RN[:, :1], torch.ones_like(ids_RN[:, :1]))
        requests = [batch.reqs[row] for row in rows]
        counts_RV = self._counts_PV[self._round.places_R]
        logits_RNV = penalised(logits_BNV[rows_R], ids_RN[:, 1:], counts_RV, _strengths_of(requests, ids_BN.device))
        _hold_back_end(logits_RNV, counts_RV.sum(dim=1), requests)
        logits_BNV[rows_R] = logits_RNV

    def accept(self, tokens_BN: torch.Tensor, commit_lens_B: torch.Tensor) -> None:
        """Count what the round committed, but for its last token: that is the next round's anchor."""
        if self._round is None:
            return
        tokens_RN = tokens_BN[self._round.rows_R]
        columns_N = torch.arange(tokens_RN.shape[1], device=tokens_RN.device)
        self._count(self._round.places_R, tokens_RN, columns_N < commit_lens_B[self._round.rows_R, None] - 1)

    def _count(self, places_R: torch.Tensor, tokens_RN: torch.Tensor, times_RN: torch.Tensor) -> None:
        if self._counts_PV is not None:
            where = (places_R[:, None].expand_as(tokens_RN), tokens_RN)
            self._counts_PV.index_put_(where, times_RN.to(torch.int32), accumulate=True)


class Strengths(NamedTuple):
    """Penalties of each request [R, 1, 1], as OpenAI and SGLang define them; 0, 0 and 1 do nothing."""

    frequency: torch.Tensor
    presence: torch.Tensor
    repetition: torch.Tensor

    def on(self, logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Penalised logits [R, N, *], of tokens that were put out `counts` times before."""
        seen = counts > 0
        logits = logits - self.frequency * counts - self.presence * seen
        return torch.where(seen, torch.where(logits < 0, logits * self.repetition, logits / self.repetition), logits)


def penalised(
    logits_RNV: torch.Tensor, drafts_RG: torch.Tensor, counts_RV: torch.Tensor, strengths: Strengths
) -> torch.Tensor:
    """The logits [R, N, V] of a block, row n penalised for `counts_RV` and the first n drafts."""
    rows, drafts = logits_RNV.shape[1], drafts_RG.shape[1]
    precedes_NG = torch.arange(drafts, device=drafts_RG.device) < torch.arange(rows, device=drafts_RG.device)[:, None]
    same_RGG = drafts_RG[:, :, None] == drafts_RG[:, None, :]
    drafted_RNG = (same_RGG[:, None] & precedes_NG[None, :, None]).sum(dim=3)
    index_RNG = drafts_RG[:, None].expand_as(drafted_RNG)
    counts_RNG = counts_RV.gather(1, drafts_RG)[:, None] + drafted_RNG
    drafted_logits_RNG = strengths.on(logits_RNV.gather(2, index_RNG), counts_RNG)
    return strengths.on(logits_RNV, counts_RV[:, None]).scatter(2, index_RNG, drafted_logits_RNG)


def is_penalised(params: Any) -> bool:
    """Whether SGLang's sampling parameters of a request ask for anything that is done here."""
    additive = params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
    return bool(additive or params.repetition_penalty != 1.0 or params.min_new_tokens > 0)


def is_asked_for(sampling_info: Any) -> bool:
    """Whether SGLang's sampling state of a batch, in the copy that a forward gets, holds any penalty."""
    return sampling_info is not None and (
        sampling_info.acc_additive_penalties is not None or sampling_info.acc_scaling_penalties is not None
    )


def _strengths_of(requests: list[Any], device: torch.device) -> Strengths:
    names = ("frequency_penalty", "presence_penalty", "repetition_penalty")
    values = [[getattr(request.sampling_params, name) for request in requests] for name in names]
    return Strengths(*torch.tensor(values, dtype=torch.float32, device=device)[:, :, None, None])


def _hold_back_end(logits_RNV: torch.Tensor, produced_R: torch.Tensor, requests: list[Any]) -> None:
    """Forbid ids that end a request in rows that come before its least number of tokens; `produced_R` so far."""
    columns_N = torch.arange(logits_RNV.shape[1], device=logits_RNV.device)
    for row, request in enumerate(requests):
        least = request.sampling_params.min_new_tokens
        if least > 0:
            ends = torch.tensor(sorted(_end_ids(request)), dtype=torch.int64, device=logits_RNV.device)
            early_N1 = (produced_R[row] + columns_N < least)[:, None]
            logits_RNV[row, :, ends] = logits_RNV[row, :, ends].masked_fill(early_N1, -torch.inf)


def _end_ids(request: Any) -> set[int]:
    """As SGLang's BatchedMinNewTokensPenalizer collects them."""
    tokenizer = request.tokenizer
    found = {*(request.sampling_params.stop_token_ids or ()), *(request.eos_token_ids or ())}
    found |= {*(tokenizer.additional_stop_token_ids or ()), tokenizer.eos_token_id}
    return {token for token in found if token is not None}
