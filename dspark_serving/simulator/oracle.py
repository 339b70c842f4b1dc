"""The best causal plan for one who knows the truth: an upper bound for every policy that may not look ahead.

It knows costs and survivals exactly. Before drafting it knows the passage that each request is in, but not the very
tokens; with the drafts, it knows the true survivals of this round. Within these bounds it maximises expected tokens
over expected seconds: by the graph tier to fill where there are tiers, by the price of a token otherwise.
"""

from __future__ import annotations

import numpy as np

from dspark_serving.scheduler.admission import admit, candidate_totals, values
from dspark_serving.scheduler.round import Batch, Outcome, Plan, Terms
from dspark_serving.simulator.runner import Simulation

_SAMPLES = 256  # requests' rounds by which a plan is judged
_PRICES = 32


class OraclePolicy:
    """Plays one simulation, whose truth it reads; plans anew every `every` rounds and whenever requests come or go."""

    name = "oracle"

    def __init__(self, simulation: Simulation, *, every: int = 8) -> None:
        self._simulation = simulation
        self._every = every
        self._rng = np.random.default_rng(0)
        self._plan: Plan | None = None
        self._age = 0
        self._members = b""

    def plan(self, batch: Batch) -> Plan:
        """The plan of the best rate, plain decoding among them."""
        members = batch.slots_R.tobytes() + batch.generations_R.tobytes()
        self._age += 1
        if self._plan is None or self._age >= self._every or members != self._members:
            self._plan, self._age, self._members = self._best(batch), 0, members
        return self._plan

    def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
        """By the true survivals, whatever the confidences say."""
        true_RG = self._simulation.conditional(batch.slots_R).astype(np.float32)
        return admit(values(true_RG), plan.price, plan.capacity)

    def terms(self, batch: Batch) -> Terms | None:
        """Not by the confidences at all."""
        return None

    def observe(self, outcome: Outcome) -> None:
        """Nothing to learn."""

    def _best(self, batch: Batch) -> Plan:
        simulation, requests = self._simulation, batch.requests
        machine, gamma = simulation.machine, simulation.world.gamma
        context = int(batch.context_R.sum())
        samples = max(8, -(-_SAMPLES // requests))
        conditional_MRG = simulation.sample_conditionals(batch.slots_R, samples, self._rng)
        survival_ME = -np.sort(-np.cumprod(conditional_MRG, axis=2).reshape(samples, -1), axis=1)
        gain_ME = np.pad(np.cumsum(survival_ME, axis=1), ((0, 0), (1, 0)))
        draft = machine.draft(requests)
        if machine.tiers is not None:
            totals = candidate_totals(requests, gamma, machine.tiers)
            choices = [Plan(True, 0.0, int(drafts), "tier", 0.0, 0.0) for drafts in totals.drafts_N]
            tokens_N = requests + gain_ME[:, totals.drafts_N].mean(axis=0)
            seconds_N = draft + machine.verify(requests, totals.total_N, context)
        else:
            price_N = np.quantile(survival_ME, np.linspace(0.0, 1.0, _PRICES))
            choices = [Plan(True, float(price), requests * gamma, "price", 0.0, 0.0) for price in price_N]
            admitted_NM = (survival_ME[None] >= price_N[:, None, None]).sum(axis=2)
            tokens_N = requests + gain_ME[np.arange(samples), admitted_NM].mean(axis=1)
            each_NM = machine.verify(requests, requests + admitted_NM.ravel(), context).reshape(admitted_NM.shape)
            seconds_N = draft + each_NM.mean(axis=1)
        rate_N = tokens_N / (seconds_N * simulation.drafting)
        best = int(rate_N.argmax())
        if rate_N[best] <= requests / machine.plain(requests, context):
            return Plan(False, 0.0, 0, "off", float(requests), machine.plain(requests, context))
        return choices[best]._replace(expected_tokens=float(tokens_N[best]), expected_seconds=float(seconds_N[best]))
