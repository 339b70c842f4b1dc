"""The drafter's context on CPU, written late: one large commit for many small ones, and committed rows only.

SGLang projects the features of every verified row at the end of every round. While nothing is drafted nobody reads
them, so they are kept until the next draft pass, and a row that was not committed is not projected at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

MOST_ROWS = 512  # kept at most: 3 MB of features for the demo drafter


class _Rows(NamedTuple):
    hidden_NM: torch.Tensor
    cache_loc_N: torch.Tensor
    positions_N: torch.Tensor


class LateCommit:
    """Stands in for TargetVerifyExecutor.commit_hidden.

    `flush` must run before a draft pass (it reads the context) and before a prefill: cache rows that were freed since
    may be given to another request, whose features must be the last ones written.
    """

    def __init__(self, kv_injector: Any, stride: int) -> None:
        self._injector = kv_injector
        self._offsets_S = torch.arange(stride)
        self._pending: list[_Rows] = []
        self._rows = 0
        self._requests: torch.Tensor | None = None

    def commit_hidden(
        self,
        *,
        batch: Any,
        layout: Any,
        hidden_strided: torch.Tensor | None,
        verify_window: Any,
        logits_output: Any,
        commit_lens: torch.Tensor,
        bs: int,
        run_compact: bool,
    ) -> None:
        """Keep the features of the committed rows (SGLang's keyword arguments)."""
        hidden = hidden_strided if hidden_strided is not None else logits_output.hidden_states
        kept_N = (self._offsets_S < commit_lens[:, None]).view(-1).nonzero().view(-1)
        self.commit_rows(
            batch, hidden[kept_N], verify_window.kv_loc_plan, kept_N, verify_window.positions_2d.view(-1)[kept_N]
        )

    def commit_rows(
        self, batch: Any, hidden_NM: torch.Tensor, kv_loc_plan: Any, kept_N: torch.Tensor, positions_N: torch.Tensor
    ) -> None:
        """Keep rows `kept_N` of the round's window [B * stride]: their features and positions."""
        if self._requests is not None and not torch.equal(self._requests, batch.req_pool_indices):
            self.flush()
        self._requests = batch.req_pool_indices
        cache_loc_N = self._injector.ids_for(kv_loc_plan).view(-1)[kept_N]
        self._pending.append(_Rows(hidden_NM, cache_loc_N, positions_N))
        self._rows += len(kept_N)
        if self._rows >= MOST_ROWS:
            self.flush()

    def begin_round(self, batch: Any, *, drafts: bool) -> None:
        """Before a round; a draft pass reads the context."""
        if drafts:
            self.flush()

    def flush(self) -> None:
        """Write what is kept into the drafter's cache."""
        if not self._pending:
            return
        hidden_NM, cache_loc_N, positions_N = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        self._rows = 0
        self._injector.inject_target_hidden(target_hidden=hidden_NM, cache_loc=cache_loc_N, positions=positions_N)
