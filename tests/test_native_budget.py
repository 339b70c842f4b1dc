"""SGLang's planner as a policy: its table, its old confidences, its ranking."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_serving.scheduler.round import Batch, Outcome, Plan
from dspark_serving.sglang_adapter.native_budget import NativeBudgetPolicy, additive_table
from dspark_serving.simulator.scenarios import CPU, GPU
from dspark_serving.simulator.worlds import Machine
from tests import test_scheduler_lossless as lossless

GAMMA = 3


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_the_table_tells_the_step_time(machine: Machine) -> None:
    table = additive_table(machine, 7, 64, 200)
    for requests in (1, 4, 16, 64):
        for tokens in range(requests, requests * 8 + 1, 7):
            true = machine.draft(requests) + machine.verify(requests, np.array([tokens]), 200 * requests)[0]
            assert table.step_time(num_reqs=requests, budget=tokens - requests) == pytest.approx(true, rel=0.03)


def a_policy(lag: int = 1) -> NativeBudgetPolicy:
    return NativeBudgetPolicy(GAMMA, 4, CPU, lag=lag)


def a_batch() -> Batch:
    return Batch.ordinary(np.arange(4), np.full(4, 100))


def play(policy: NativeBudgetPolicy, confidence: float) -> int:
    """One round; returns its budget."""
    batch = a_batch()
    plan = policy.plan(batch)
    confidence_RG = np.full((4, GAMMA), confidence, dtype=np.float32)
    lens_R = policy.admit(batch, plan, confidence_RG)
    policy.observe(Outcome(batch, plan, confidence_RG, lens_R, lens_R - 1, 0.01, 0.1, True))
    return plan.capacity


def test_the_budget_comes_from_confidences_two_rounds_old() -> None:
    policy = a_policy()
    everything = 4 * GAMMA
    # Nothing is known in the first two rounds: survivals of 1, so everything pays.
    assert [play(policy, 0.01), play(policy, 0.99)] == [everything, everything]
    assert play(policy, 0.99) == 0  # of the first round
    assert play(policy, 0.01) == everything  # of the second


def test_with_results_two_rounds_late_nothing_is_held_back_further() -> None:
    policy = a_policy(lag=2)
    assert play(policy, 0.01) == 4 * GAMMA
    assert play(policy, 0.99) == 0


def test_a_slot_that_changed_hands_counts_as_sure() -> None:
    policy = a_policy()
    for _ in range(4):
        play(policy, 0.01)
    batch = a_batch()._replace(generations_R=np.array([0, 0, 0, 1]))
    assert policy.plan(batch).capacity == GAMMA


def test_the_present_confidences_rank() -> None:
    policy = a_policy()
    confidence_RG = np.array([[0.9, 0.9, 0.1], [0.2, 0.9, 0.9], [0.8, 0.8, 0.8], [0.1, 0.1, 0.1]], dtype=np.float32)
    plan = policy.plan(a_batch())._replace(capacity=5)
    assert policy.admit(a_batch(), plan, confidence_RG).tolist() == [3, 1, 4, 1]


@settings(max_examples=100, deadline=None)
@given(
    before_RG=lossless.blocks(),
    after_RG=lossless.blocks(),
    r=st.integers(0, lossless.REQUESTS - 1),
    k=st.integers(1, lossless.GAMMA),
    budget=st.integers(0, lossless.REQUESTS * lossless.GAMMA),
)
def test_its_ranking_does_not_anticipate(
    before_RG: np.ndarray, after_RG: np.ndarray, r: int, k: int, budget: int
) -> None:
    policy = NativeBudgetPolicy(lossless.GAMMA, lossless.REQUESTS, CPU)
    plan = Plan(True, 0.0, budget, "native", 0.0, 0.0)
    assert not lossless.anticipates(policy, plan, before_RG, after_RG, r, k)
