"""No policy anticipates: what it verifies never depends on the token that is judged.

Every check has a policy that does anticipate, and must catch it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dspark_serving.scheduler.adaptive import AdaptivePolicy
from dspark_serving.scheduler.admission import values
from dspark_serving.scheduler.baselines import Algorithm1Policy, FullPolicy, OffPolicy, ThresholdPolicy
from dspark_serving.scheduler.cost import CostModel
from dspark_serving.scheduler.round import Batch, Outcome, Plan, Policy
from tests.scheduler_worlds import LinearCosts, live

GAMMA, REQUESTS = 4, 4


class GlobalSearch(FullPolicy):
    """Anticipates: a global argmax of the rate with this round's confidences."""

    name = "anticipating"

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost

    def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
        requests = batch.requests
        flat = values(np.nan_to_num(confidence_RG, nan=1.0).clip(0, 1)).ravel()
        order = np.argsort(-flat, kind="stable")
        tokens_N = requests + np.arange(flat.size + 1)
        tau_N = requests + np.concatenate(([0.0], np.cumsum(flat[order])))
        best = int((tau_N / (self._cost.draft(requests) + self._cost.verify(requests, tokens_N, 0))).argmax())
        return (1 + np.bincount(order[:best] % requests, minlength=requests)).astype(np.int32)


def experienced(policy: Policy, acceptance: float) -> Policy:
    live(policy, LinearCosts(), lambda i: acceptance, requests=REQUESTS, gamma=GAMMA, rounds=24)
    return policy


def adaptive(acceptance: float, tiers: tuple[int, ...] | None = None, base: float = 0.06) -> Policy:
    return experienced(AdaptivePolicy(GAMMA, REQUESTS, LinearCosts(base=base, tiers=tiers)), acceptance)


TIERS = (4, 8, 12, 16, 20)
POLICIES: dict[str, Policy] = {
    "full": FullPolicy(),
    "off": OffPolicy(),
    "threshold": ThresholdPolicy(0.3),
    "algorithm1": Algorithm1Policy(LinearCosts()),
    "adaptive, new": AdaptivePolicy(GAMMA, REQUESTS, LinearCosts()),
    "adaptive, no cost": AdaptivePolicy(GAMMA, REQUESTS, CostModel.unknown()),
    "adaptive, price": adaptive(0.6),
    "adaptive, bypass": adaptive(0.9, base=10.0),
    "adaptive, off": adaptive(0.1),
    "adaptive, tier": adaptive(0.6, TIERS),
}
ANYTHING = st.one_of(st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf, -1.0]), st.floats(0, 1, width=32))


def blocks() -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, (REQUESTS, GAMMA), elements=ANYTHING)


def this_batch(requests: int = REQUESTS) -> Batch:
    return Batch.ordinary(np.arange(requests), np.full(requests, 100, dtype=np.int64))


def anticipates(policy: Policy, plan: Plan, before_RG: np.ndarray, after_RG: np.ndarray, r: int, k: int) -> bool:
    """Whether what comes behind position k of request r (known only from its token on) changes its first k."""
    changed_RG = before_RG.copy()
    changed_RG[r, k:] = after_RG[r, k:]
    lens = [int(policy.admit(this_batch(), plan, c_RG)[r]) for c_RG in (before_RG, changed_RG)]
    return min(lens[0], k + 1) != min(lens[1], k + 1)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=100, deadline=None)
@given(before_RG=blocks(), after_RG=blocks(), r=st.integers(0, REQUESTS - 1), k=st.integers(1, GAMMA))
def test_no_policy_anticipates(name: str, before_RG: np.ndarray, after_RG: np.ndarray, r: int, k: int) -> None:
    policy = POLICIES[name]
    assert not anticipates(policy, policy.plan(this_batch()), before_RG, after_RG, r, k)


def test_the_same_check_catches_a_policy_that_does() -> None:
    rng = np.random.default_rng(0)
    policy = GlobalSearch(LinearCosts(base=0.01, per_token=0.004, tiers=(4, 20)))
    plan = policy.plan(this_batch())
    pairs = rng.random((300, 2, REQUESTS, GAMMA), dtype=np.float32) ** 0.3
    assert any(anticipates(policy, plan, before_RG, after_RG, 0, k) for before_RG, after_RG in pairs for k in (1, 2))


def test_the_policies_above_are_in_the_states_that_they_name() -> None:
    reasons = {name: policy.plan(this_batch()).reason for name, policy in POLICIES.items()}
    assert [reasons[f"adaptive, {state}"] for state in ("price", "bypass", "off", "tier")] == [
        "price",
        "bypass",
        "off",
        "tier",
    ]
    assert 0 < POLICIES["adaptive, tier"].plan(this_batch()).capacity < REQUESTS * GAMMA


@settings(max_examples=100, deadline=None)
@given(confidence_RG=blocks())
def test_the_total_of_a_tier_is_known_beforehand(confidence_RG: np.ndarray) -> None:
    policy = POLICIES["adaptive, tier"]
    plan = policy.plan(this_batch())
    assert plan.price == 0.0
    assert policy.admit(this_batch(), plan, confidence_RG).sum() == REQUESTS + plan.capacity


# ---- Appendix A of the DSpark paper, exactly


class AppendixCosts(LinearCosts):
    """1.0, 0.5 and 0.45 steps a second for 1, 2 and 3 tokens."""

    def draft(self, requests: int, sampled: int = 0) -> float:
        return 0.0

    def verify(self, requests: int, tokens_N: np.ndarray, context: int, sampled: int = 0) -> np.ndarray:
        seconds: np.ndarray = np.array([math.inf, 1.0, 2.0, 1 / 0.45])[tokens_N]
        return seconds


def first_token_is_a(policy: Policy, plan: Plan) -> float:
    """Probability that the round emits A first: p_t = (.7, .3), p_d = (.5, .5), by enumeration."""
    target, draft = {"A": 0.7, "B": 0.3}, {"A": 0.5, "B": 0.5}
    total = 0.0
    for drafted, next_confidence in (("A", 0.9), ("B", 0.0)):
        length = int(policy.admit(this_batch(1), plan, np.array([[0.8, next_confidence]], dtype=np.float32))[0])
        if length == 1:
            emits_a = target["A"]  # nothing verified: a token of the target
        else:
            accepted = min(1.0, target[drafted] / draft[drafted])
            emits_a = accepted * (drafted == "A") + (1 - accepted)  # a rejected B is replaced by A
        total += draft[drafted] * emits_a
    return total


def test_appendix_a_is_lossless_under_every_plan() -> None:
    policy = AdaptivePolicy(2, 1, AppendixCosts())
    for price in (0.0, 0.5, 0.75, 0.85, 1.1):
        for capacity in (0, 1, 2):
            plan = Plan(True, price, capacity, "price", 1.0, 1.0)
            assert first_token_is_a(policy, plan) == pytest.approx(0.7)
    for other in (policy, FullPolicy(), ThresholdPolicy(0.75), OffPolicy(), Algorithm1Policy(AppendixCosts())):
        assert first_token_is_a(other, other.plan(this_batch(1))) == pytest.approx(0.7)


def test_appendix_a_catches_the_same_step_global_search() -> None:
    policy = GlobalSearch(AppendixCosts())
    assert first_token_is_a(policy, policy.plan(this_batch(1))) == pytest.approx(0.85)


# ---- the whole round, sampled

VOCABULARY, TOKENS = 3, 3
RNG = np.random.default_rng(5)
TARGET_VV = RNG.dirichlet(np.full(VOCABULARY, 1.0), size=VOCABULARY)
DRAFT_VV = RNG.dirichlet(np.full(VOCABULARY, 1.0), size=VOCABULARY)
OVERLAP_V = np.minimum(TARGET_VV, DRAFT_VV).sum(axis=1)
"""Probability that a token drafted behind each token is accepted: the perfect confidence."""


def draw(rng: np.random.Generator, probability_RV: np.ndarray) -> np.ndarray:
    edges_RV = np.cumsum(probability_RV, axis=1)
    drawn_R: np.ndarray = (rng.random((len(edges_RV), 1)) * edges_RV[:, -1:] > edges_RV).sum(axis=1)
    return drawn_R


def decode_round(policy: Policy, rng: np.random.Generator, last_R: np.ndarray, peeks: bool) -> list[list[int]]:
    """Draft, truncate, accept, bonus: the tokens that each request emits."""
    requests = len(last_R)
    batch = this_batch(requests)
    plan = policy.plan(batch)
    before_GR, drafted_GR = np.empty((GAMMA, requests), dtype=int), np.empty((GAMMA, requests), dtype=int)
    token_R = last_R
    for k in range(GAMMA):
        before_GR[k], drafted_GR[k] = token_R, draw(rng, DRAFT_VV[token_R])
        token_R = drafted_GR[k]
    # Confidence k sees the token before x_k; peeking, x_k itself.
    confidence_RG = OVERLAP_V[drafted_GR if peeks else before_GR].T.astype(np.float32)
    lens_R = policy.admit(batch, plan, confidence_RG) if plan.drafts else np.ones(requests, dtype=np.int32)
    emitted: list[list[int]] = []
    accepted_R = np.zeros(requests, dtype=np.int32)
    for r in range(requests):
        tokens: list[int] = []
        previous = int(last_R[r])
        for k in range(int(lens_R[r]) - 1):
            token = int(drafted_GR[k, r])
            if rng.random() >= min(1.0, TARGET_VV[previous, token] / DRAFT_VV[previous, token]):
                residual_V = np.maximum(TARGET_VV[previous] - DRAFT_VV[previous], 0.0)
                tokens.append(int(draw(rng, residual_V[None])[0]))
                break
            tokens.append(token)
            previous = token
        else:
            tokens.append(int(draw(rng, TARGET_VV[previous][None])[0]))
        accepted_R[r] = len(tokens) - 1
        emitted.append(tokens)
    shown_RG = confidence_RG if plan.drafts else None
    policy.observe(Outcome(batch, plan, shown_RG, lens_R, accepted_R, 0.008, 0.1, False))
    return emitted


def deviation(policy: Policy, peeks: bool = False, samples: int = 250) -> float:
    """Chi-square of the first tokens of many texts against the exact distribution, in standard deviations."""
    rng = np.random.default_rng(1)
    counts = np.zeros((VOCABULARY,) * TOKENS)
    for _ in range(samples):
        texts: list[list[int]] = [[] for _ in range(16)]
        last_R = np.zeros(16, dtype=int)
        while min(map(len, texts)) < TOKENS:
            for r, tokens in enumerate(decode_round(policy, rng, last_R, peeks)):
                texts[r] += tokens
                last_R[r] = tokens[-1]
        for text in texts:
            counts[tuple(text[:TOKENS])] += 1
    exact = np.einsum("a,ab,bc->abc", TARGET_VV[0], TARGET_VV, TARGET_VV) * counts.sum()
    degrees = counts.size - 1
    return float((((counts - exact) ** 2 / exact).sum() - degrees) / math.sqrt(2 * degrees))


SAMPLED: dict[str, Callable[[], Policy]] = {
    "threshold": lambda: ThresholdPolicy(0.4),
    "algorithm1": lambda: Algorithm1Policy(LinearCosts(base=0.02)),
    "adaptive, price": lambda: AdaptivePolicy(GAMMA, 16, LinearCosts(draft=0.001)),
    "adaptive, tier": lambda: AdaptivePolicy(GAMMA, 16, LinearCosts(draft=0.001, tiers=(16, 32, 48, 80))),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_texts_have_the_target_distribution(name: str) -> None:
    assert abs(deviation(SAMPLED[name]())) < 4.5


def test_the_sampled_check_catches_confidences_that_see_their_token() -> None:
    assert deviation(ThresholdPolicy(0.4), peeks=True) > 10
