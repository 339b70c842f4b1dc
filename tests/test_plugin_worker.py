"""Pieces of the worker that need no server: phase times, the planner's lengths, a round without drafts."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from dspark_serving.metrics import WINDOW, RoundStats
from dspark_serving.scheduler.policies import OffPolicy, Policy, ThresholdPolicy
from dspark_serving.sglang_adapter.planner import PolicyPlanner
from dspark_serving.sglang_adapter.proposer import PolicyProposer


def test_round_stats_roll() -> None:
    stats = RoundStats()
    assert stats.accepted_length is None
    for _ in range(WINDOW):
        stats.count([9])
    for _ in range(WINDOW):
        stats.count([0, 2])  # two requests: one and three tokens, the bonus tokens included
    assert stats.accepted_length == 2.0
    assert (stats.requests, stats.tokens) == (3 * WINDOW, 14 * WINDOW)


def test_round_stats_time_what_they_wrap() -> None:
    stats = RoundStats()
    timed = stats.timed("verify", lambda seconds: time.sleep(seconds))
    with stats.round():
        timed(0.02)
    assert stats.seconds["round"] >= stats.seconds["verify"] >= 0.02
    assert stats.snapshot()["rounds"] == 1


def planner(policy: Policy) -> PolicyPlanner:
    found = PolicyPlanner.__new__(PolicyPlanner)
    found.gamma = 3
    found._tp_sync = SimpleNamespace(sync=lambda site, tensor: tensor)
    found.use(policy)
    return found


@pytest.mark.parametrize(
    ("policy", "confidence", "expected", "budget"),
    [
        (ThresholdPolicy(0.5), torch.tensor([[0.9, 0.4, 1.0], [1.0, 1.0, 1.0]]), [2, 4], None),
        (OffPolicy(), None, [1, 1], 0),
    ],
    ids=["threshold", "off"],
)
def test_planner_asks_the_policy(
    policy: Policy, confidence: torch.Tensor | None, expected: list[int], budget: int | None
) -> None:
    ours = planner(policy)
    slots = torch.tensor([4, 7])
    lens = ours._schedule_verify_lens(
        req_pool_indices=slots, prefix_lens=slots, device=torch.device("cpu"), confidence=confidence, budget=None
    )
    assert (lens.tolist(), lens.dtype) == (expected, torch.int32)
    found = ours.resolve_verify_token_budget(
        draft_input=None, confidence=confidence, prefix_lens=slots, req_pool_indices=slots
    )
    assert found == budget


def test_a_round_without_drafts_proposes_certain_mask_tokens() -> None:
    proposer = PolicyProposer.__new__(PolicyProposer)
    proposer.policy, proposer.gamma, proposer.query_token_num, proposer._mask_token_id = OffPolicy(), 3, 3, 7
    proposer._draft_block_ids_buf = None
    proposal = proposer.propose(
        draft_input=SimpleNamespace(bonus_tokens=torch.tensor([11, 12])), bs=2, sampling_info=None
    )
    assert proposal.draft_block_ids[:, 0].tolist() == [11, 12]
    assert proposal.draft_block.draft_tokens.tolist() == [[7] * 3, [7] * 3]
    assert proposal.draft_block.greedy_draft
    assert proposal.confidence is None
