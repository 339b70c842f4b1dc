"""A small made-up engine that runs a policy, with and without overlap, for tests of recordings."""

from __future__ import annotations

from collections import deque

import numpy as np

from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.catalog import PolicyParts
from dspark_serving.scheduler.cost import CostModel, CostSample
from dspark_serving.scheduler.round import Batch, Outcome, Policy

GAMMA, SLOTS = 4, 8


def seconds_of(requests: int, tokens: int, context: int, drafted: bool) -> float:
    return 0.002 + 0.0007 * tokens + 1e-7 * context + (0.001 + 0.0002 * requests if drafted else 0.0)


def new_parts(calibration: Calibration | None = None) -> PolicyParts:
    """The same costs each time, in objects of their own."""
    samples = []
    for requests in (1, 2, 4, 8):
        for tokens in (requests, 2 * requests, requests * (GAMMA + 1)):
            for drafted in (True, False):
                seconds = seconds_of(requests, tokens, 100 * requests, drafted)
                draft = 0.001 + 0.0002 * requests if drafted else 0.0
                samples.append(
                    CostSample(requests, tokens if drafted else requests, 100 * requests, draft, seconds, drafted)
                )
    cost = CostModel.fit(samples)
    return PolicyParts(GAMMA, SLOTS, cost, calibration or Calibration.identity(GAMMA), 0.3, 0.0)


def run(policy: Policy, rounds: int, *, seed: int = 0, lag: int = 0, quality: float = 1.0) -> list[Outcome]:
    """Rounds of changing batches; with `lag`, a round's outcome is told only after so many later plans."""
    rng = np.random.default_rng(seed)
    open_rounds: deque[Outcome] = deque()
    outcomes: list[Outcome] = []
    generations = np.zeros(SLOTS, dtype=np.int64)
    for _ in range(rounds):
        slots_R = np.sort(rng.choice(SLOTS, rng.integers(1, SLOTS + 1), replace=False))
        generations[rng.random(SLOTS) < 0.02] += 1
        temperature_R = rng.choice([0.0, 0.5, 1.0], len(slots_R)).astype(np.float32)
        batch = Batch.ordinary(slots_R, rng.integers(10, 500, len(slots_R)), generations[slots_R].copy())
        batch = batch._replace(temperature_R=temperature_R)
        plan = policy.plan(batch)
        true_RG = 1 / (1 + np.exp(-rng.normal(quality, 1.0, (len(slots_R), GAMMA))))
        confidence_RG = (true_RG**1.3).astype(np.float32)
        would_accept_R = np.cumprod(rng.random(true_RG.shape) < true_RG, axis=1).sum(axis=1)
        lens_R = np.ones(len(slots_R), dtype=np.int32)
        if plan.drafts:
            lens_R = policy.admit(batch, plan, confidence_RG)
        seconds = seconds_of(len(slots_R), int(lens_R.sum()), int(batch.context_R.sum()), plan.drafts)
        seconds *= float(rng.lognormal(0.0, 0.05))
        outcome = Outcome(
            batch,
            plan,
            confidence_RG if plan.drafts else None,
            lens_R,
            np.minimum(would_accept_R, lens_R - 1).astype(np.int32),
            0.001 + 0.0002 * len(slots_R) if plan.drafts else 0.0,
            seconds,
            bool(rng.random() < 0.95),
        )
        outcomes.append(outcome)
        open_rounds.append(outcome)
        if len(open_rounds) > lag:
            policy.observe(open_rounds.popleft())
    while open_rounds:
        policy.observe(open_rounds.popleft())
    return outcomes
