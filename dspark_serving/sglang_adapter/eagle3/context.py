"""The context of an Eagle3 drafter: its keys and values of committed rows, and the features that wait for a token.

Row i needs the target's features at position i and token i + 1. After a prefill or a verification every committed row
but the last has its token; the features of the last one wait, one row a request, until the next round brings the token
(its anchor). A drafting round consumes them in its first step; a round without drafts writes the row.

Rows are found by the request's place in SGLang's pool. What waits there is overwritten by the prefill that every
request starts with, so a request that ended, was aborted or was retracted leaves nothing behind. A prefix that came
from SGLang's radix cache has its rows, but the last of them was paired with the token of the request that computed it
(or was not written, when that request ended there), and a slot that several requests share keeps the last writer's row:
that can cost accepted drafts, never exactness.

Legend of shape suffixes: S places of the request pool, R requests, N rows, M features of a position.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.kv_loc_plan import IdSpaceKind
from sglang.srt.speculative.dspark_components.dspark_kv_inject import PrefillPlacement, TargetHiddenKvInjector
from torch.nn.functional import pad

from dspark_serving.sglang_adapter.cpu.commit import MOST_ROWS


class _Rows(NamedTuple):
    features_NM: torch.Tensor
    next_tokens_N: torch.Tensor
    positions_N: torch.Tensor
    cache_loc_N: torch.Tensor


class _Prefill(NamedTuple):
    """A prefill before its forward: the tokens that follow its rows, and chunks that it continues."""

    places_R: torch.Tensor
    next_tokens_N: torch.Tensor
    """Of the last row of each request: anything, its token is not known yet."""
    first_tokens_R: torch.Tensor
    last_R: torch.Tensor
    """Row of the prefill that is a request's last."""
    continued_R: torch.Tensor
    """Requests whose row before this prefill waits for the prefill's first token."""
    cache_loc_R: torch.Tensor
    """Where the row before the prefill belongs."""
    before_R: torch.Tensor
    """Its position."""


class ChainContext(TargetHiddenKvInjector):
    """Stands in for SGLang's injector of target features, and for TargetVerifyExecutor.commit_hidden.

    Where `late` is set, rows of rounds are kept and written together before a draft pass or a prefill, as in
    cpu/commit.py: a row whose slot went to another request since is written before that request's rows.
    """

    late = False
    drafted_RG: torch.Tensor
    """The block of the round under way, set by the proposer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._waiting_SM = torch.empty(0, 0)
        self._pending: list[_Rows] = []
        self._pending_rows = 0
        self._requests: torch.Tensor | None = None
        self._chunk_ends: dict[int, tuple[int, int]] = {}  # place: (its generation, position of what waits there)

    def place_prefill(self, batch: Any) -> PrefillPlacement:
        """Where the rows of a prefill go (SGLang calls this before the target's forward)."""
        self._prefill = self._read_prefill(batch)
        return super().place_prefill(batch)

    def _read_prefill(self, batch: Any) -> _Prefill:
        pool = self.model_runner.req_to_token_pool
        places = batch.req_pool_indices_cpu
        places = (batch.req_pool_indices.cpu() if places is None else places).tolist()
        generations = pool.req_generation[places].tolist()
        ends: list[int] = []
        continued: list[bool] = []
        for place, generation, prefix, new in zip(
            places, generations, batch.prefix_lens, batch.extend_lens, strict=True
        ):
            continued.append(self._chunk_ends.get(place) == (generation, prefix - 1))
            self._chunk_ends[place] = (generation, prefix + new - 1)
            ends.append((ends[-1] if ends else 0) + new)
        device = batch.input_ids.device
        before_R = torch.tensor(batch.prefix_lens, device=device) - 1
        return _Prefill(
            places_R=batch.req_pool_indices,
            next_tokens_N=batch.input_ids.roll(-1),
            first_tokens_R=batch.input_ids[torch.tensor([0, *ends[:-1]], device=device)],
            last_R=torch.tensor(ends, device=device) - 1,
            continued_R=torch.tensor(continued, device=device),
            cache_loc_R=self._cache_loc(batch.req_pool_indices, before_R),
            before_R=before_R,
        )

    def inject_prefill(self, placement: PrefillPlacement, *, target_hidden: torch.Tensor, **unused: Any) -> None:
        """Write the rows of a prefill whose next token is known; the last one of each request waits."""
        prefill, rows = self._prefill, len(placement.positions)
        features_NM = target_hidden[:rows]
        on = prefill.continued_R
        if bool(on.any()):
            self._write(
                _Rows(
                    self._waiting(prefill.places_R[on]),
                    prefill.first_tokens_R[on],
                    prefill.before_R[on],
                    prefill.cache_loc_R[on],
                )
            )
        known_N = torch.ones(rows, dtype=torch.bool, device=features_NM.device)
        known_N[prefill.last_R] = False
        self._write(
            _Rows(
                features_NM[known_N],
                prefill.next_tokens_N[known_N],
                placement.positions[known_N],
                placement.cache_loc[known_N],
            )
        )
        self._wait(prefill.places_R, features_NM[prefill.last_R])

    def begin_round(self, batch: Any, *, drafts: bool) -> None:
        """Before a round: what waits now has its token, the anchor; a draft pass writes that row itself."""
        if drafts:
            self.flush()
            return
        positions_R = batch.seq_lens - 1
        features_RM = self._waiting(batch.req_pool_indices)
        cache_loc_R = self._cache_loc(batch.req_pool_indices, positions_R)
        self._keep(batch, _Rows(features_RM, batch.spec_info.bonus_tokens.view(-1), positions_R, cache_loc_R))

    def first_rows(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """h [R, D] of each request's last committed row, and where that row's keys and values belong [R]."""
        rows = self.model_runner.req_to_token_pool.req_to_token
        cache_loc_R = rows[batch.req_pool_indices, batch.seq_lens - 1].long()
        return self.draft_model.hidden_of(self._waiting(batch.req_pool_indices)), cache_loc_R

    def commit_hidden(
        self,
        *,
        batch: Any,
        hidden_strided: torch.Tensor | None,
        verify_window: Any,
        logits_output: Any,
        commit_lens: torch.Tensor,
        bs: int,
        **unused: Any,
    ) -> None:
        """Take the features of a verified window [bs * stride] (SGLang's keyword arguments).

        The accepted drafts are the next tokens of all committed rows but the last.
        """
        hidden = hidden_strided if hidden_strided is not None else logits_output.hidden_states
        stride = self.verify_num_draft_tokens
        hidden_NM = hidden.view(bs * stride, -1)
        lens_R = commit_lens.long()
        if self.late:
            followed = self._block_pos_offsets[:stride] < (lens_R - 1)[:, None]
            kept_N = followed.view(-1).nonzero().view(-1)
        else:  # selecting would wait for the device; rows that are not committed are overwritten before they are read
            kept_N = torch.arange(bs * stride, device=hidden.device)
        self._keep(
            batch,
            _Rows(
                hidden_NM[kept_N],
                pad(self.drafted_RG, (0, 1)).view(-1)[kept_N],
                verify_window.positions_2d.reshape(-1)[kept_N],
                self.ids_for(verify_window.kv_loc_plan).view(-1)[kept_N],
            ),
        )
        last_R = torch.arange(bs, device=hidden.device) * stride + lens_R - 1
        self._wait(batch.req_pool_indices, hidden_NM[last_R])

    def commit_rows(
        self, batch: Any, hidden_NM: torch.Tensor, kv_loc_plan: Any, kept_N: torch.Tensor, positions_N: torch.Tensor
    ) -> None:
        """Take the features of a plain decoding step: one row a request, which waits."""
        self._wait(batch.req_pool_indices, hidden_NM)

    def flush(self) -> None:
        """Write what is kept."""
        if not self._pending:
            return
        rows = _Rows(*(torch.cat(parts) for parts in zip(*self._pending, strict=True)))
        self._pending.clear()
        self._pending_rows = 0
        self._write(rows)

    def _keep(self, batch: Any, rows: _Rows) -> None:
        if self.late:
            if self._requests is not None and not torch.equal(self._requests, batch.req_pool_indices):
                self.flush()
            self._requests = batch.req_pool_indices
        self._pending.append(rows)
        self._pending_rows += len(rows.positions_N)
        if not self.late or self._pending_rows >= MOST_ROWS:
            self.flush()

    def _write(self, rows: _Rows) -> None:
        if len(rows.positions_N):
            with torch.inference_mode():
                self.draft_model.write_rows(self.draft_model_runner.token_to_kv_pool, *rows)

    @torch.inference_mode()
    def _wait(self, places_R: torch.Tensor, features_RM: torch.Tensor) -> None:
        if self._waiting_SM.shape[1] != features_RM.shape[1]:  # the first features of all
            places = self.model_runner.req_to_token_pool.req_to_token.shape[0]
            self._waiting_SM = features_RM.new_zeros(places, features_RM.shape[1])
        self._waiting_SM[places_R] = features_RM

    def _waiting(self, places_R: torch.Tensor) -> torch.Tensor:
        return self._waiting_SM[places_R]

    def _cache_loc(self, places_R: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
        """Slots of the draft pool [R] for these positions."""
        slots_R = self.model_runner.req_to_token_pool.req_to_token[places_R, positions_R.clamp(min=0)].long()
        translate = self.draft_model_runner.kv_index_translator.space(IdSpaceKind.FULL).write
        return slots_R if translate is None else translate(slots_R)
