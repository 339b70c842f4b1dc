"""SGLang's own planner behind our interface: its budget function, table, two-rounds-old confidences and ranking.

Only the table is ours to give: SGLang's profiler writes one offline, here it is read off a cost model.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
from sglang.kernels.ops.speculative.dspark.dspark_schedule import schedule_verify_lens_topk
from sglang.srt.speculative.dspark_components.dspark_planner import DSparkScheduleConfig, HostConfidenceBudgetPlanner
from sglang.srt.speculative.dspark_components.dspark_sps import SpsAdditiveCostTable

from dspark_serving.scheduler.recalibration import BANDS
from dspark_serving.scheduler.round import Batch, Outcome, Plan, Terms
from dspark_serving.scheduler.survival import sanitise


class StepCost(Protocol):
    """Seconds of a drafting round; `scheduler.cost.CostModel` is one."""

    @property
    def tiers(self) -> tuple[int, ...] | None:
        """Captured token totals; None: every total has a cost of its own."""
        ...

    def draft(self, requests: int) -> float:
        """Of the draft pass."""
        ...

    def verify(self, requests: int, tokens_N: np.ndarray, context: int) -> np.ndarray:
        """Of the rest, for each total of verified tokens."""
        ...


class NativeBudgetPolicy:
    """Always drafts; the budget is the argmax of expected tokens over the table's step time."""

    name = "native"

    def __init__(self, gamma: int, slots: int, cost: StepCost, *, context: int = 256, lag: int = 1) -> None:
        """Profile `cost` once.

        Args:
            gamma: drafted tokens a block.
            slots: requests that the engine can hold.
            cost: read when the policy is made, never again: SGLang's table stays as it was profiled.
            context: committed tokens a request during that profile.
            lag: rounds after which `observe` tells of a round: 1 without overlap, 2 with it.
        """
        self._gamma = gamma
        self._config = DSparkScheduleConfig(gamma=gamma)
        pool = SimpleNamespace(req_to_token=torch.empty(slots, 0))
        self._planner = HostConfidenceBudgetPlanner(
            sps_table=additive_table(cost, gamma, slots, context),
            cfg=self._config,
            model_runner=SimpleNamespace(req_to_token_pool=pool),
            relay_lag_steps=lag,
        )
        self._confidence_SG = torch.zeros(slots, gamma)
        self._generation_S = torch.full((slots,), -1, dtype=torch.int64)
        self._line_2BG = np.zeros((2, len(BANDS), gamma), dtype=np.float32)
        self._line_2BG[0] = 1.0

    def plan(self, batch: Batch) -> Plan:
        """SGLang's `prepare_verify_budget`."""
        slots_R = torch.from_numpy(batch.slots_R)
        budget = self._planner.compute_budget(
            confidence=self._confidence_SG[slots_R],
            generation=self._generation_S[slots_R],
            # SGLang numbers the users of a slot from 1 and takes 0 for "nobody yet".
            current_generation=torch.from_numpy(batch.generations_R) + 1,
            req_pool_indices_cpu=slots_R,
        )
        decision = self._planner.take_last_decision()
        seconds = decision and decision.predicted_step_seconds
        if decision is None or seconds is None:
            return Plan(True, 0.0, budget, self.name, math.nan, math.nan)
        return Plan(True, 0.0, budget, self.name, float(decision.predicted_theta or math.nan) * seconds, seconds)

    def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
        """The best `capacity` of this round's confidences."""
        chosen_R = schedule_verify_lens_topk(
            confidence=torch.from_numpy(sanitise(confidence_RG)[0]), budget=plan.capacity, cfg=self._config
        )
        lens_R: np.ndarray = chosen_R.numpy()
        return lens_R

    def terms(self, batch: Batch) -> Terms | None:
        """Confidences as they are, requests alike."""
        return Terms(np.ones(batch.requests, dtype=np.float32), self._line_2BG)

    def observe(self, outcome: Outcome) -> None:
        """Keep the confidences for the rounds to come."""
        if outcome.confidence_RG is None:
            return
        slots_R = torch.from_numpy(outcome.batch.slots_R)
        self._confidence_SG[slots_R] = torch.from_numpy(outcome.confidence_RG)
        self._generation_S[slots_R] = torch.from_numpy(outcome.batch.generations_R) + 1


def additive_table(cost: StepCost, gamma: int, slots: int, context: int) -> SpsAdditiveCostTable:
    """SGLang's two-dimensional table, with probes as dense as its format allows: both edges of every tier.

    The least-squares fit of bias + alpha(requests) + theta(tokens) over the cells that can occur.
    """
    sizes = sorted({min(2**octave, slots) for octave in range(slots.bit_length() + 1)})
    most = slots * (gamma + 1)
    if cost.tiers:
        edges = [total for end in cost.tiers for total in (end, end + 1) if total <= most]
    else:
        edges = [round(total) for total in np.geomspace(1, most, 48)]
    totals = sorted({1, most, *sizes, *edges})
    rows, seconds = [], []
    for i, size in enumerate(sizes):
        allowed = [j for j, total in enumerate(totals) if size <= total <= size * (gamma + 1)]
        tokens_N = np.array([totals[j] for j in allowed])
        seconds += (cost.draft(size) + cost.verify(size, tokens_N, context * size)).tolist()
        rows += [(i, j) for j in allowed]
    design = np.zeros((len(rows), len(sizes) + len(totals)))
    for row, (i, j) in enumerate(rows):
        design[row, [i, len(sizes) + j]] = 1.0
    target = np.array(seconds)
    # Relative errors count, as far as each cell's own time; lstsq settles the free constant.
    solution = np.linalg.lstsq(design / target[:, None], np.ones(len(rows)), rcond=None)[0]
    alpha, theta = solution[: len(sizes)], solution[len(sizes) :]
    bias = float(target.min()) / 2
    return SpsAdditiveCostTable(
        bias_seconds=bias,
        bs_probes=sizes,
        alpha_seconds=(alpha - bias).tolist(),
        m_probes=totals,
        theta_seconds=theta.tolist(),
    )
