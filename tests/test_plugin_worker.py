"""Pieces of the worker that need no server: phase times, the planner's lengths, a round without drafts."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dspark_serving.metrics import WINDOW, RoundStats
from dspark_serving.scheduler.admission import admit, values
from dspark_serving.scheduler.baselines import Algorithm1Policy, FullPolicy, OffPolicy, ThresholdPolicy
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.catalog import PolicyParts, make_policy
from dspark_serving.scheduler.cost import CostModel
from dspark_serving.scheduler.recalibration import OnlineCalibration
from dspark_serving.scheduler.round import Batch, Outcome, Plan, Policy, Terms
from dspark_serving.sglang_adapter.device import DeviceAdmission
from dspark_serving.sglang_adapter.native_budget import NativeBudgetPolicy
from dspark_serving.sglang_adapter.plan_sync import PlanSync
from dspark_serving.sglang_adapter.planner import PolicyPlanner
from dspark_serving.sglang_adapter.proposer import PolicyProposer
from tests.scheduler_worlds import LinearCosts

GAMMA = 3


def outcome(accepted: list[int], verify_lens: list[int], policy: Policy | None = None) -> Outcome:
    slots_R = np.arange(len(accepted))
    batch = Batch.ordinary(slots_R, slots_R + 10)
    plan = (policy or FullPolicy()).plan(batch)
    lens_R = np.array(verify_lens, dtype=np.int32)
    return Outcome(batch, plan, None, lens_R, np.array(accepted, dtype=np.int32), 0.01, 0.1, True)


def test_round_stats_roll_and_add_up() -> None:
    stats = RoundStats()
    assert stats.accepted_length is None
    for _ in range(WINDOW):
        stats.count(outcome([9], [10]), 9)
    for _ in range(WINDOW):
        stats.count(outcome([0, 2], [1, 4], OffPolicy()), 3)  # one and three tokens, the bonus tokens included
    assert stats.accepted_length == 2.0
    assert (stats.requests, stats.tokens, stats.verified_tokens) == (3 * WINDOW, 14 * WINDOW, 15 * WINDOW)
    assert stats.snapshot()["plans"] == {"full": WINDOW, "off": WINDOW}
    assert stats.padding_tokens == 0
    stats.count(outcome([0, 1], [1, 2]), 3, tiers=(4, 8, 16))  # three rows; the plan allows eight, and its graph runs
    assert (stats.budget_tokens, stats.tier_tokens, stats.padding_tokens) == (6, 8, 5)
    stats.count(outcome([0, 0], [1, 1], OffPolicy()), 3, tiers=(4, 8, 16))
    assert (stats.budget_tokens, stats.tier_tokens, stats.padding_tokens) == (0, 4, 7)
    stats.clear()
    assert stats.snapshot()["output_tokens"] == 0


def test_round_stats_time_what_they_wrap() -> None:
    stats = RoundStats()
    timed = stats.timed("verify", lambda seconds: time.sleep(seconds))
    with stats.round():
        timed(0.02)
        timed(0.01)
    assert stats.snapshot()["phase_seconds_total"]["round"] >= stats.snapshot()["phase_seconds_total"]["verify"] >= 0.03
    assert 0.02 > stats.newest("verify") >= 0.01
    assert stats.snapshot()["rounds"] == 1


def planner(policy: Policy) -> PolicyPlanner:
    found = PolicyPlanner.__new__(PolicyPlanner)
    found.gamma = GAMMA
    found._tp_sync = SimpleNamespace(sync=lambda site, tensor: tensor)
    found.model_runner = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_generation=torch.ones(16, dtype=torch.int64))
    )
    found.policy, found.plan_sync = policy, PlanSync(None)
    return found


def running_batch() -> SimpleNamespace:
    params = SimpleNamespace(top_k=1, temperature=1.0, custom_params=None)
    reqs = [SimpleNamespace(rid=str(i), sampling_params=params) for i in range(2)]
    slots = torch.tensor([4, 7])
    return SimpleNamespace(
        reqs=reqs, req_pool_indices_cpu=slots, req_pool_indices=slots, seq_lens_cpu=torch.tensor([20, 30])
    )


CONFIDENCE = torch.tensor([[0.9, 0.4, 1.0], [1.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("policy", "confidence", "expected", "verify_all"),
    [
        (ThresholdPolicy(0.5), CONFIDENCE, [2, 4], False),
        (OffPolicy(), None, [1, 1], False),
        (FullPolicy(), CONFIDENCE, [4, 4], True),
        (Algorithm1Policy(CostModel.unknown()), CONFIDENCE, [4, 4], True),
        (Algorithm1Policy(LinearCosts(base=0.01, per_token=0.01, draft=0.0)), CONFIDENCE, [2, 4], False),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_planner_asks_the_policy(
    policy: Policy, confidence: torch.Tensor | None, expected: list[int], verify_all: bool
) -> None:
    ours = planner(policy)
    plan = ours.begin(running_batch())
    assert plan.drafts == (confidence is not None)
    assert ours._is_verify_all == verify_all
    slots = torch.tensor([4, 7])
    budget = ours.resolve_verify_token_budget(
        draft_input=None, confidence=confidence, prefix_lens=slots, req_pool_indices=slots
    )
    assert budget == (2 * GAMMA if plan.drafts else 0)
    lens = ours._schedule_verify_lens(
        req_pool_indices=slots, prefix_lens=slots, device=torch.device("cpu"), confidence=confidence, budget=None
    )
    assert (lens.tolist(), lens.dtype) == (expected, torch.int32)
    assert ours.verify_lens_R.numpy().tolist() == expected


def test_under_overlap_the_amount_is_known_before_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = planner(OffPolicy())
    ours._budget_planner = SimpleNamespace()
    ours._schedule_cfg = SimpleNamespace(min_verify_len=1)
    ours.verify_num_draft_tokens = GAMMA + 1
    monkeypatch.setattr(ours, "_maybe_gather_dp_verify_tier", lambda **_: None)
    batch = running_batch()
    batch.spec_info = SimpleNamespace(verify_token_budget=None)
    batch.forward_mode = SimpleNamespace(is_extend=lambda: False)
    batch.is_extend_in_batch, batch.batch_size = False, lambda: 2
    ours.prepare_verify_budget(batch, future_map=None)
    assert (batch.spec_info.verify_token_budget, batch.spec_verify_tier_num_tokens) == (0, 2)
    ours.policy = FullPolicy()  # too late for this round
    assert ours.begin(batch).reason == "off"
    ours.prepare_verify_budget(batch, future_map=None)
    assert (batch.spec_info.verify_token_budget, batch.spec_verify_tier_num_tokens) == (6, 8)
    assert ours.begin(batch).reason == "full"


class Learning(ThresholdPolicy):
    """With what its calibration has learned so far, and requests that weigh differently."""

    def __init__(self, calibration: OnlineCalibration) -> None:
        super().__init__(0.5, calibration.apply)
        self.calibration = calibration
        self.weight_R = np.array([1.0, 1.5], dtype=np.float32)

    def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
        calibrated_RG = self.calibration.apply(confidence_RG, batch.temperature_R)
        return admit(values(calibrated_RG, self.weight_R), plan.price, confidence_RG.size)

    def terms(self, batch: Batch) -> Terms:
        return Terms(self.weight_R, self.calibration.line_2BG)


def test_what_is_told_for_the_device_is_what_the_host_goes_by() -> None:
    parts = PolicyParts(GAMMA, 16, LinearCosts(), Calibration((0.5, 2.0, 1.0)), threshold=0.5, speed_floor=1e6)
    batch = Batch.ordinary(np.arange(2), np.full(2, 20))
    policies = [make_policy(name, parts) for name in ("threshold", "adaptive")]
    policies.append(NativeBudgetPolicy(GAMMA, 16, LinearCosts()))
    for policy in policies:
        plan = policy.plan(batch)._replace(drafts=True, price=0.0 if policy.name == "native" else 0.4)
        if policy.name != "threshold":  # which knows no capacity
            plan = plan._replace(capacity=4)
        lens_R = policy.admit(batch, plan, CONFIDENCE.numpy())
        policy.observe(Outcome(batch, plan, CONFIDENCE.numpy(), lens_R, np.array([0, 0], np.int32), 0.01, 0.1, True))
        terms = policy.terms(batch)
        assert terms is not None
        on_device = DeviceAdmission(4, GAMMA, "cpu")(CONFIDENCE, plan, batch, terms)
        assert on_device.tolist() == policy.admit(batch, plan, CONFIDENCE.numpy()).tolist(), policy.name
        if policy.name == "adaptive":  # both are slower than their floor
            assert terms.weight_R.min() > 1.0
    assert make_policy("algorithm1", parts).terms(batch) is None


def test_admission_on_the_device_reuses_its_buffers_and_agrees_with_the_host() -> None:
    calibration = OnlineCalibration(Calibration.identity(GAMMA))
    ours = planner(Learning(calibration))
    ours.device_admission = DeviceAdmission(requests=4, gamma=GAMMA, device="cpu")
    addresses: set[int] = set()
    decisions: set[tuple[int, ...]] = set()
    nothing_R, greedy_R = np.zeros(64, dtype=np.int32), np.zeros(64, dtype=np.float32)
    for confidence in (CONFIDENCE, CONFIDENCE.flip(0), CONFIDENCE):
        if decisions:  # what is learned from earlier rounds counts on the device too: here, that nothing survives
            calibration.observe(np.full((64, GAMMA), 0.9, dtype=np.float32), nothing_R + GAMMA + 1, nothing_R, greedy_R)
        ours.begin(running_batch())
        slots = torch.tensor([4, 7])
        ours.resolve_verify_token_budget(
            draft_input=None, confidence=confidence, prefix_lens=slots, req_pool_indices=slots
        )
        lens = ours._schedule_verify_lens(
            req_pool_indices=slots, prefix_lens=slots, device=torch.device("cpu"), confidence=confidence, budget=None
        )
        assert lens.tolist() == ours.policy.admit(ours.batch, ours.plan, confidence.numpy()).tolist()
        addresses.add(lens.data_ptr())
        decisions.add(tuple(lens.tolist()))
    assert len(addresses) == 1
    assert len(decisions) > 1


def test_a_round_without_drafts_proposes_certain_mask_tokens() -> None:
    proposer = PolicyProposer.__new__(PolicyProposer)
    proposer.gamma, proposer.query_token_num, proposer._mask_token_id = GAMMA, GAMMA, 7
    proposer.plan = outcome([0], [1], OffPolicy()).plan
    proposer._draft_block_ids_buf = None
    proposal = proposer.propose(
        draft_input=SimpleNamespace(bonus_tokens=torch.tensor([11, 12])), bs=2, sampling_info=None
    )
    assert proposal.draft_block_ids[:, 0].tolist() == [11, 12]
    assert proposal.draft_block.draft_tokens.tolist() == [[7] * 3, [7] * 3]
    assert proposal.draft_block.greedy_draft
    assert proposal.confidence is None
