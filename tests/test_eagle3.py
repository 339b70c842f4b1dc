"""The context of an Eagle3 drafter without a server: which token each row is paired with, and when it is written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dspark_serving.sglang_adapter.cpu.commit import MOST_ROWS
from dspark_serving.sglang_adapter.eagle3.context import ChainContext

GAMMA, WIDTH, PLACES, LENGTH = 3, 2, 4, 32
STRIDE = GAMMA + 1


class Drafter:
    """Stands in for the model: remembers rows as slot -> (feature, next token, position)."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[float, int, int]] = {}
        self.writes = 0

    def write_rows(
        self, pool: Any, features: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> None:
        self.writes += 1
        values = (features[:, 0].tolist(), tokens.tolist(), positions.tolist())
        self.rows |= dict(zip(slots.tolist(), zip(*values, strict=True), strict=True))

    def hidden_of(self, features: torch.Tensor) -> torch.Tensor:
        return features


class World:
    """A context over fakes; the slot of position i at place p is 100 p + i, unless `slots` is changed."""

    def __init__(self, *, late: bool) -> None:
        slots = 100 * torch.arange(PLACES)[:, None] + torch.arange(LENGTH)
        pool = SimpleNamespace(req_to_token=slots.int(), req_generation=torch.zeros(PLACES, dtype=torch.int64))
        self.slots, self.generation, self.drafter = pool.req_to_token, pool.req_generation, Drafter()
        translator = SimpleNamespace(space=lambda kind: SimpleNamespace(write=None))
        runner = SimpleNamespace(token_to_kv_pool=SimpleNamespace(), kv_index_translator=translator)
        self.context = ChainContext(
            draft_model=self.drafter,
            draft_model_runner=runner,
            model_runner=SimpleNamespace(req_to_token_pool=pool),
            device="cpu",
            verify_num_draft_tokens=STRIDE,
            block_pos_offsets=torch.arange(STRIDE),
        )
        self.context.late = late
        self.context.ids_for = lambda plan: plan

    def prefill(self, place: int, tokens: list[int], prefix: int = 0) -> None:
        """A chunk of one request; the feature of position i is i."""
        self.context.flush()
        positions = torch.arange(prefix, prefix + len(tokens))
        batch = SimpleNamespace(
            req_pool_indices_cpu=torch.tensor([place]),
            req_pool_indices=torch.tensor([place]),
            prefix_lens=[prefix],
            extend_lens=[len(tokens)],
            input_ids=torch.tensor(tokens),
        )
        self.context._prefill = self.context._read_prefill(batch)
        placement: Any = SimpleNamespace(positions=positions, cache_loc=self.slots[place, positions].long())
        self.context.inject_prefill(placement, target_hidden=features(positions))

    def batch(self, lens: dict[int, int], anchors: list[int]) -> SimpleNamespace:
        """A running batch: committed tokens by place, and the token after them."""
        return SimpleNamespace(
            req_pool_indices=torch.tensor(list(lens)),
            seq_lens=torch.tensor(list(lens.values())),
            spec_info=SimpleNamespace(bonus_tokens=torch.tensor(anchors)),
        )

    def plain_round(self, lens: dict[int, int], anchors: list[int]) -> None:
        batch = self.batch(lens, anchors)
        self.context.begin_round(batch, drafts=False)
        self.context.commit_rows(batch, features(batch.seq_lens), None, torch.arange(len(lens)), batch.seq_lens)

    def draft_round(self, lens: dict[int, int], drafts: list[list[int]], commit_lens: list[int]) -> torch.Tensor:
        """A drafting round; returns the features that its draft pass started from."""
        batch = self.batch(lens, [0] * len(lens))
        self.context.begin_round(batch, drafts=True)
        first, _ = self.context.first_rows(batch)
        self.context.drafted_RG = torch.tensor(drafts)
        positions = batch.seq_lens[:, None] + torch.arange(STRIDE)
        self.context.commit_hidden(
            batch=batch,
            hidden_strided=features(positions.view(-1)),
            verify_window=SimpleNamespace(
                positions_2d=positions, kv_loc_plan=self.slots[batch.req_pool_indices[:, None], positions].long()
            ),
            logits_output=None,
            commit_lens=torch.tensor(commit_lens),
            bs=len(lens),
        )
        return first[:, 0]


def features(positions: torch.Tensor) -> torch.Tensor:
    return positions[:, None].expand(-1, WIDTH).float()


@pytest.mark.parametrize("late", [True, False])
def test_rows_get_the_token_after_them(late: bool) -> None:
    world = World(late=late)
    world.prefill(1, [10, 11, 12])
    assert world.drafter.rows == {100: (0, 11, 0), 101: (1, 12, 1)}  # the last one waits for the first answer
    assert world.draft_round({1: 3}, [[21, 22, 23]], [3]).tolist() == [2]
    world.context.flush()
    written = {103: (3, 21, 3), 104: (4, 22, 4)}  # row 102 is the draft pass's own, row 105 waits
    assert {slot: row for slot, row in world.drafter.rows.items() if slot in written or slot == 102} == written
    assert world.draft_round({1: 6}, [[0, 0, 0]], [1]).tolist() == [5]


def test_a_chunk_goes_on_where_the_last_one_waited() -> None:
    world = World(late=True)
    world.prefill(1, [10, 11])
    world.slots[1, 1] = 77  # SGLang may move a chunk's rows to equal ones in its cache
    world.prefill(1, [12, 13], prefix=2)
    assert world.drafter.rows == {100: (0, 11, 0), 77: (1, 12, 1), 102: (2, 13, 2)}


def test_a_cached_prefix_is_not_paired_with_what_waited_for_another_request() -> None:
    world = World(late=True)
    world.prefill(1, [10, 11])
    world.generation[1] += 1  # the place went to another request
    world.prefill(1, [12, 13], prefix=2)
    assert world.drafter.rows == {100: (0, 11, 0), 102: (2, 13, 2)}


def test_plain_rounds_wait_for_one_write_and_lose_no_row() -> None:
    world = World(late=True)
    world.prefill(1, [10])
    for step in range(5):
        world.plain_round({1: 1 + step}, [30 + step])
    assert world.drafter.writes == 0
    assert world.draft_round({1: 6}, [[0, 0, 0]], [1]).tolist() == [5]
    assert world.drafter.writes == 1
    assert world.drafter.rows == {100 + i: (i, 30 + i, i) for i in range(5)}


def test_a_slot_that_went_to_another_request_keeps_the_later_row() -> None:
    world = World(late=True)
    world.prefill(1, [10, 11])
    world.prefill(2, [20, 21])
    world.plain_round({1: 2, 2: 2}, [12, 22])  # keeps row 1 of both
    world.slots[2, 2] = 101  # request 1 ended, and its slot is the next one of request 2
    world.plain_round({2: 3}, [23])
    world.context.flush()
    assert world.drafter.rows[101] == (2, 23, 2)


def test_what_is_kept_is_bounded() -> None:
    world = World(late=True)
    world.prefill(1, [10])
    for _ in range(MOST_ROWS):
        world.plain_round({1: 1}, [0])
    assert world.drafter.writes == 1
