"""Small worlds for the scheduler's tests: known costs, and traffic whose acceptance is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dspark_serving.scheduler.cost import CostModel
from dspark_serving.scheduler.round import Batch, Outcome, Policy


class LinearCosts(CostModel):
    """seconds = base + per_token * tokens, plus a draft pass; learns nothing."""

    def __init__(
        self, base: float = 0.06, per_token: float = 0.002, draft: float = 0.008, tiers: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(None, tiers=tiers)
        self.base, self.per_token, self.draft_seconds = base, per_token, draft
        self.observations = 0

    @property
    def known(self) -> bool:
        return True

    def draft(self, requests: int, sampled: int = 0) -> float:
        return self.draft_seconds

    def verify(self, requests: int, tokens_N: np.ndarray, context: int, sampled: int = 0) -> np.ndarray:
        if self.tiers is not None:
            ends = np.array([*self.tiers, 1 << 30])
            end_N = ends[np.searchsorted(ends[:-1], tokens_N)]
            tokens_N = np.where(end_N < 1 << 30, end_N, tokens_N)
        return self.base + self.per_token * np.asarray(tokens_N, dtype=np.float64)

    def plain(self, requests: int, context: int, sampled: int = 0) -> float:
        return float(self.verify(requests, np.array([requests]), context)[0])

    def observe(self, *args: object, **kwargs: object) -> None:
        self.observations += 1


class Summary(NamedTuple):
    tokens: int
    seconds: float
    reasons: Counter[str]
    drafted: list[bool]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def live(
    policy: Policy,
    world: CostModel,
    acceptance: Callable[[int], float],
    *,
    requests: int = 4,
    gamma: int = 4,
    rounds: int = 300,
    shown: Callable[[np.ndarray], np.ndarray] = lambda confidence_RG: confidence_RG,
    seed: int = 0,
) -> Summary:
    """Rounds of equal requests whose conditional acceptance scatters around acceptance(round).

    `world` tells the time that rounds truly take; the policy may believe otherwise. `shown` distorts the confidences.
    """
    rng = np.random.default_rng(seed)
    summary = Summary(0, 0.0, Counter(), [])
    for i in range(rounds):
        context_R = np.full(requests, 100, dtype=np.int64)
        batch = Batch.ordinary(np.arange(requests), context_R)
        plan = policy.plan(batch)
        context = int(context_R.sum())
        accepted_R, lens_R = np.zeros(requests, dtype=np.int32), np.ones(requests, dtype=np.int32)
        confidence_RG, draft_seconds = None, 0.0
        if plan.drafts:
            true_RG = np.clip(acceptance(i) + rng.uniform(-0.1, 0.1, (requests, gamma)), 0, 1).astype(np.float32)
            confidence_RG = shown(true_RG)
            lens_R = policy.admit(batch, plan, confidence_RG)
            survived_R = np.cumprod(rng.random((requests, gamma)) < true_RG, axis=1).sum(axis=1)
            accepted_R = np.minimum(survived_R, lens_R - 1).astype(np.int32)
            draft_seconds = world.draft(requests)
            seconds = draft_seconds + float(world.verify(requests, lens_R.sum(keepdims=True), context)[0])
        else:
            seconds = world.plain(requests, context)
        policy.observe(Outcome(batch, plan, confidence_RG, lens_R, accepted_R, draft_seconds, seconds, True))
        summary.reasons[plan.reason] += 1
        summary.drafted.append(plan.drafts)
        tokens = summary.tokens + requests + int(accepted_R.sum())
        summary = summary._replace(tokens=tokens, seconds=summary.seconds + seconds)
    return summary
