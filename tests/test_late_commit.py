"""The drafter's context on CPU is written late, but everything is written, in order, and by committed rows only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from dspark_serving.sglang_adapter.cpu import commit
from dspark_serving.sglang_adapter.cpu.commit import LateCommit

STRIDE, WIDTH = 3, 4


class Injector:
    """Stands in for SGLang's: a cache of rows, and how often it was written to."""

    def __init__(self) -> None:
        self.cache: dict[int, tuple[float, int]] = {}
        self.writes = 0

    def ids_for(self, plan: torch.Tensor) -> torch.Tensor:
        return plan

    def inject_target_hidden(
        self, *, target_hidden: torch.Tensor, cache_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        self.writes += 1
        for hidden, row, position in zip(target_hidden, cache_loc.tolist(), positions.tolist(), strict=True):
            self.cache[row] = (float(hidden[0]), position)


def one_round(late: LateCommit, slots: list[int], first_row: int, commit_lens: list[int], value: float) -> None:
    rows = len(slots) * STRIDE
    window: Any = SimpleNamespace(
        kv_loc_plan=torch.arange(first_row, first_row + rows), positions_2d=torch.arange(rows).view(-1, STRIDE)
    )
    late.commit_hidden(
        batch=SimpleNamespace(req_pool_indices=torch.tensor(slots)),
        layout=None,
        hidden_strided=torch.full((rows, WIDTH), value),
        verify_window=window,
        logits_output=None,
        commit_lens=torch.tensor(commit_lens),
        bs=len(slots),
        run_compact=True,
    )


def test_committed_rows_are_written_at_the_flush_and_no_others() -> None:
    injector = Injector()
    late = LateCommit(injector, STRIDE)
    one_round(late, [1, 2], 10, [1, 3], 0.5)
    assert injector.cache == {}
    late.flush()
    assert injector.cache == {10: (0.5, 0), 13: (0.5, 3), 14: (0.5, 4), 15: (0.5, 5)}
    late.flush()
    assert injector.writes == 1


def test_rounds_wait_for_one_write() -> None:
    injector = Injector()
    late = LateCommit(injector, STRIDE)
    for step in range(5):
        one_round(late, [1], 10 + step, [1], float(step))
    late.flush()
    assert injector.writes == 1
    assert [injector.cache[10 + step][0] for step in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_row_that_went_to_another_request_keeps_the_later_features() -> None:
    injector = Injector()
    late = LateCommit(injector, STRIDE)
    one_round(late, [1], 10, [1], 1.0)
    one_round(late, [2], 10, [1], 2.0)  # request 1 ended, its cache row was given to request 2
    late.flush()
    assert injector.cache[10] == (2.0, 0)
    assert injector.writes == 2


def test_what_waits_is_bounded() -> None:
    injector = Injector()
    late = LateCommit(injector, STRIDE)
    for step in range(commit.MOST_ROWS // STRIDE + 1):
        one_round(late, [1], STRIDE * step, [3], 0.0)
    assert injector.writes == 1
