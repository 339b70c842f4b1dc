"""The adaptive policy in small worlds whose best answer is known."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from dspark_serving.scheduler import adaptive
from dspark_serving.scheduler.adaptive import AdaptivePolicy
from dspark_serving.scheduler.baselines import Algorithm1Policy, FullPolicy, OffPolicy, ThresholdPolicy
from dspark_serving.scheduler.cost import CostModel, CostSample
from dspark_serving.scheduler.round import Batch, Outcome, Plan, Policy
from tests.scheduler_worlds import LinearCosts, live

GAMMA = 4


def this_batch(requests: int, floor: list[float] | None = None, weight: list[float] | None = None) -> Batch:
    batch = Batch.ordinary(np.arange(requests), np.full(requests, 100, dtype=np.int64))
    if floor is not None:
        batch = batch._replace(floor_R=np.array(floor, dtype=np.float32))
    if weight is not None:
        batch = batch._replace(weight_R=np.array(weight, dtype=np.float32))
    return batch


def finish(
    policy: AdaptivePolicy,
    batch: Batch,
    plan: Plan,
    confidence_RG: np.ndarray,
    accepted: list[int],
    seconds: float = 0.1,
) -> None:
    lens_R = np.full(batch.requests, GAMMA + 1, dtype=np.int32)
    policy.observe(Outcome(batch, plan, confidence_RG, lens_R, np.array(accepted, dtype=np.int32), 0.01, seconds, True))


@pytest.mark.parametrize("requests", [1, 4, 16])
@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.85])
def test_close_to_the_best_threshold_found_afterwards(requests: int, acceptance: float) -> None:
    costs = LinearCosts()
    thresholds = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
    others: list[Policy] = [OffPolicy(), *(ThresholdPolicy(threshold) for threshold in thresholds)]
    rounds = {1: 1200, 4: 600, 16: 300}[requests]
    best = max(live(p, costs, lambda i: acceptance, requests=requests, rounds=rounds).rate for p in others)
    ours = live(AdaptivePolicy(GAMMA, 16, costs), costs, lambda i: acceptance, requests=requests, rounds=rounds).rate
    assert ours >= 0.96 * best


def test_stops_drafting_where_that_is_slower_and_pays_little_for_looking() -> None:
    costs = LinearCosts()
    off = live(OffPolicy(), costs, lambda i: 0.1, requests=16, rounds=1500)
    full = live(FullPolicy(), costs, lambda i: 0.1, requests=16, rounds=1500)
    ours = live(AdaptivePolicy(GAMMA, 16, costs), costs, lambda i: 0.1, requests=16, rounds=1500)
    assert full.rate < 0.7 * off.rate
    assert ours.rate > 0.99 * off.rate
    assert 0 < sum(ours.drafted[100:]) < 15  # it goes on looking


@pytest.mark.parametrize("requests", [1, 8])
def test_finds_its_way_back(requests: int) -> None:
    costs = LinearCosts()
    summary = live(
        AdaptivePolicy(GAMMA, 8, costs), costs, lambda i: 0.1 if i < 300 else 0.9, requests=requests, rounds=1000
    )
    assert sum(summary.drafted[100:300]) < 60
    assert sum(summary.drafted[800:]) > 190


def test_boastful_confidences_do_not_keep_it_drafting() -> None:
    costs = LinearCosts()

    def speed(policy: Policy) -> float:
        return live(policy, costs, lambda i: 0.12, requests=8, rounds=1000, shown=lambda c_RG: 0 * c_RG + 0.99).rate

    policy = AdaptivePolicy(GAMMA, 8, costs)
    assert speed(policy) > 0.97 * speed(OffPolicy())
    assert policy.realism(sampled=False) < 0.5
    assert speed(FullPolicy()) < 0.8 * speed(OffPolicy())


def test_a_wrong_cost_model_is_found_out() -> None:
    world, belief = LinearCosts(draft=0.15), LinearCosts(draft=0.001)
    off = live(OffPolicy(), world, lambda i: 0.6, requests=4, rounds=600).rate
    assert live(FullPolicy(), world, lambda i: 0.6, requests=4, rounds=600).rate < 0.8 * off
    ours = live(AdaptivePolicy(GAMMA, 4, belief), world, lambda i: 0.6, requests=4, rounds=600)
    assert 0 < sum(ours.drafted[20:]) < 10  # after the warm-up only a look now and then
    assert ours.rate > 0.93 * off


def test_without_cost_data_everything_is_verified_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = AdaptivePolicy(GAMMA, 4, CostModel.unknown())
    with caplog.at_level(logging.WARNING):
        plans = [policy.plan(this_batch(2)) for _ in range(3)]
    assert {plan.reason for plan in plans} == {"no-cost-data"}
    assert policy.admit(this_batch(2), plans[0], np.zeros((2, GAMMA), dtype=np.float32)).tolist() == [5, 5]
    assert len(caplog.records) == 1


def test_everything_is_verified_where_tokens_are_nearly_free() -> None:
    costs = LinearCosts(per_token=1e-6)
    summary = live(AdaptivePolicy(GAMMA, 4, costs), costs, lambda i: 0.7)
    assert set(summary.reasons) <= {"warm-up", "bypass", "probe"}
    assert summary.reasons["probe"] <= 4


def test_tiers_are_filled_to_their_end() -> None:
    costs = LinearCosts(tiers=(16, 24, 32, 48, 80))
    policy = AdaptivePolicy(GAMMA, 16, costs)
    summary = live(policy, costs, lambda i: 0.6, requests=16, rounds=40)
    plan = policy.plan(this_batch(16))
    assert summary.reasons["tier"] > 20
    assert plan.price == 0.0
    assert plan.capacity + 16 in (16, 24, 32, 48, 80)
    assert plan.capacity < 16 * GAMMA


@pytest.mark.parametrize("trials", [True, False])
def test_a_tier_that_the_profile_has_too_dear_is_found_by_trying_it(
    trials: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the best tier was measured at the start, another tenant ran; without trials nothing ever corrects that."""
    tiers = (16, 24, 32, 48, 80)
    world = LinearCosts(per_token=0.0013, tiers=tiers)
    samples = []
    for requests in (1, 4, 16):
        context = 100 * requests
        for tokens in [tier for tier in tiers if requests <= tier <= requests * (GAMMA + 1)]:
            disturbed = 1.3 if tokens == 48 else 1.0
            rest = disturbed * float(world.verify(requests, np.array([tokens]), context)[0])
            samples += [CostSample(requests, tokens, context, 0.008, 0.008 + rest, True)] * 2
        samples += [CostSample(requests, requests, context, 0.0, world.plain(requests, context), False)] * 2
    if not trials:
        monkeypatch.setattr(adaptive, "_TRIAL", 1 << 30)
    policy = AdaptivePolicy(GAMMA, 16, CostModel.fit(samples, tiers))
    live(policy, world, lambda i: 0.62, requests=16, rounds=120)
    totals = [plan.capacity + 16 for plan in (policy.plan(this_batch(16)) for _ in range(9)) if plan.reason == "tier"]
    assert (max(totals, key=totals.count) == 48) == trials


def test_a_heavier_request_is_verified_further() -> None:
    costs = LinearCosts()
    policy = AdaptivePolicy(GAMMA, 4, costs)
    live(policy, costs, lambda i: 0.6, rounds=40)
    batch = this_batch(4, weight=[1, 1, 1, 3])
    lens_R = policy.admit(batch, policy.plan(batch), np.full((4, GAMMA), 0.6, dtype=np.float32))
    assert lens_R[3] > lens_R[0] == lens_R[1] == lens_R[2]
    ordinary = this_batch(4)
    heavier_later = ordinary._replace(weight_R=batch.weight_R)  # the floors are the very array seen to ask for nothing
    for same in (ordinary, ordinary):
        assert len(set(policy.admit(same, policy.plan(same), np.full((4, GAMMA), 0.6, dtype=np.float32)))) == 1
    plans = [policy.plan(heavier_later) for _ in range(2)]  # one of them may be a look at plain decoding
    plan = next(plan for plan in plans if plan.drafts)
    lens_R = policy.admit(heavier_later, plan, np.full((4, GAMMA), 0.6, dtype=np.float32))
    assert lens_R[3] > lens_R[0]


def test_a_request_below_its_floor_is_raised() -> None:
    policy = AdaptivePolicy(GAMMA, 2, LinearCosts(base=0.02))
    batch = this_batch(2, floor=[0.0, 35.0])
    confidence_RG = np.full((2, GAMMA), 0.6, dtype=np.float32)
    for _ in range(40):  # 10 and 20 tokens a second: the second one is behind its floor
        finish(policy, batch, policy.plan(batch), confidence_RG, [0, 1])
    plan = policy.plan(batch)
    lens_R = policy.admit(batch, plan._replace(price=0.0, capacity=4), confidence_RG)
    assert lens_R[1] > lens_R[0]
    ordinary = this_batch(2)
    assert policy.admit(ordinary, plan._replace(price=0.0, capacity=4), confidence_RG).tolist() == [3, 3]


def test_a_floor_cuts_the_total_down_to_what_keeps_it() -> None:
    # Two tiers: the large one has the better rate, but a request whose drafts fail gets one token in 0.26 s there.
    costs = LinearCosts(base=0.08, per_token=0.0022, draft=0.001, tiers=(16, 48, 80))
    policy = AdaptivePolicy(GAMMA, 16, costs)
    batch = this_batch(16)
    confidence_RG = np.full((16, GAMMA), 0.97, dtype=np.float32)
    confidence_RG[0] = 0.01
    for _ in range(20):
        finish(policy, batch, policy.plan(batch), confidence_RG, [0] + [4] * 15, seconds=0.257)
    free = policy.plan(batch)
    bound = policy.plan(this_batch(16, floor=[5.0] + [0.0] * 15))
    assert free.expected_seconds > 1 / 5
    assert bound.expected_seconds < 1 / 5
    assert bound.reason == "tier"


def test_expected_tokens_count_every_request_alike() -> None:
    costs = LinearCosts()
    found = []
    for weight in (1.0, 4.0):
        policy = AdaptivePolicy(GAMMA, 4, costs)
        live(policy, costs, lambda i: 0.6, rounds=40)
        found.append(policy.plan(this_batch(4, weight=[weight] * 4)).expected_tokens)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    light, heavy = (
        AdaptivePolicy(GAMMA, 4, costs).plan(this_batch(4, weight=[weight] * 4)).expected_tokens
        for weight in (1e-6, 1e6)
    )
    assert 4 <= light <= 4 * (GAMMA + 1)
    assert light == pytest.approx(heavy, rel=1e-5)


def test_expected_tokens_of_mixed_weights_are_those_of_what_is_admitted() -> None:
    costs = LinearCosts()
    policy = AdaptivePolicy(GAMMA, 4, costs)
    batch, confidence_RG = this_batch(4, weight=[1, 1, 1, 3]), np.full((4, GAMMA), 0.6, dtype=np.float32)
    for _ in range(80):  # acceptance as predicted, so that realism stays at 1
        finish(policy, batch, policy.plan(batch), confidence_RG, [1, 1, 2, 1])
    plan = next(plan for plan in (policy.plan(batch) for _ in range(20)) if plan.reason == "price")
    lens_R = policy.admit(batch, plan, confidence_RG)
    survival_G = np.cumprod(confidence_RG[0])
    admitted = 4 + policy.realism(sampled=False) * sum(float(survival_G[: length - 1].sum()) for length in lens_R)
    assert plan.expected_tokens == pytest.approx(admitted, rel=0.05)


def test_a_floor_that_cannot_be_met_is_said_and_served(caplog: pytest.LogCaptureFixture) -> None:
    costs = LinearCosts(draft=0.001)
    policy = AdaptivePolicy(GAMMA, 2, costs, speed_floor=1000.0)
    summary = live(policy, costs, lambda i: 0.9, requests=2, rounds=60)
    assert summary.reasons["floor-unmet"] > 30
    assert policy.incidents.unmet_floors > 30
    assert caplog.text.count("cannot be met") == 1
    assert summary.rate > live(OffPolicy(), costs, lambda i: 0.9, requests=2, rounds=60).rate


def test_bad_confidences_are_verified_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = AdaptivePolicy(GAMMA, 1, LinearCosts())
    batch, bad_RG = this_batch(1), np.array([[0.9, math.nan, 2.0, 0.001]], dtype=np.float32)
    plan = Plan(True, 0.5, GAMMA, "price", 1.0, 1.0)
    assert policy.admit(batch, plan, bad_RG).tolist() == [4]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            finish(policy, batch, plan, bad_RG, [2])
    assert policy.incidents.bad_confidences == 6
    assert len(caplog.records) == 1
    assert math.isfinite(policy.plan(batch).price)


def test_impossible_outcomes_are_ignored_and_counted() -> None:
    costs = LinearCosts()
    policy = AdaptivePolicy(GAMMA, 1, costs)
    batch, good_RG = this_batch(1), np.full((1, GAMMA), 0.5, dtype=np.float32)
    plan = policy.plan(batch)
    for seconds in (-1.0, 0.0, math.nan, math.inf):
        finish(policy, batch, plan, good_RG, [1], seconds=seconds)
    before = policy.realism(sampled=False)
    finish(policy, batch, plan, good_RG, [GAMMA + 1])
    assert policy.incidents.bad_outcomes == 5
    assert costs.observations == 0
    assert policy.realism(sampled=False) == before


def test_unsteady_rounds_teach_no_time() -> None:
    costs = LinearCosts()
    policy = AdaptivePolicy(GAMMA, 1, costs)
    batch, c_RG = this_batch(1), np.full((1, GAMMA), 0.5, dtype=np.float32)
    outcome = Outcome(
        batch, policy.plan(batch), c_RG, np.array([5], dtype=np.int32), np.array([2], dtype=np.int32), 0.01, 9.0, False
    )
    policy.observe(outcome)
    assert costs.observations == 0
    policy.observe(outcome._replace(steady=True))
    assert costs.observations == 1


@pytest.mark.parametrize(
    "policy",
    [
        AdaptivePolicy(GAMMA, 4, LinearCosts()),
        FullPolicy(),
        OffPolicy(),
        ThresholdPolicy(0.5),
        Algorithm1Policy(LinearCosts()),
    ],
    ids=lambda policy: policy.name,
)
def test_no_request(policy: Policy) -> None:
    batch, none_RG = this_batch(0), np.zeros((0, GAMMA), dtype=np.float32)
    plan = policy.plan(batch)
    lens_R = policy.admit(batch, plan, none_RG)
    assert lens_R.shape == (0,)
    empty_R = np.zeros(0, dtype=np.int32)
    policy.observe(Outcome(batch, plan, none_RG, lens_R, empty_R, 0.0, 0.1, True))


def algorithm_1(confidence_RG: np.ndarray, costs: CostModel) -> list[int]:
    """The paper's loop, pair by pair."""
    requests, gamma = confidence_RG.shape
    survival_RG = np.cumprod(confidence_RG, axis=1)
    pairs = sorted((-float(survival_RG[r, k]), k, r) for r in range(requests) for k in range(gamma))
    lens, tau, tokens = [1] * requests, float(requests), requests

    def theta() -> float:
        return tau / (costs.draft(requests) + float(costs.verify(requests, np.array([tokens]), 0)[0]))

    for negative, _, r in pairs:
        last = theta()
        tau, tokens = tau - negative, tokens + 1
        if theta() < last:
            break
        lens[r] += 1
    return lens


def test_algorithm_1_stops_at_the_first_drop() -> None:
    rng = np.random.default_rng(0)
    for tiers in (None, (4, 7, 9, 20)):
        costs = LinearCosts(base=0.01, tiers=tiers)
        policy = Algorithm1Policy(costs)
        for _ in range(50):
            c_RG = rng.random((4, GAMMA), dtype=np.float32) ** 0.5
            batch = this_batch(4)
            assert policy.admit(batch, policy.plan(batch), c_RG).tolist() == algorithm_1(c_RG, costs)
