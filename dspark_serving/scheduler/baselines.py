"""The policies that the adaptive one is measured against, and that can be chosen in its place."""

from __future__ import annotations

import math
import sys

import numpy as np

from dspark_serving.scheduler.admission import admit, values
from dspark_serving.scheduler.cost import CostModel
from dspark_serving.scheduler.round import Batch, Outcome, Plan, Terms
from dspark_serving.scheduler.survival import Calibrate, calibrated


class _Unlearning:
    """A policy that decides alike in every round."""

    def terms(self, batch: Batch) -> Terms | None:
        """Only `admit` knows."""
        return None

    def observe(self, outcome: Outcome) -> None:
        """Learns nothing."""


class FullPolicy(_Unlearning):
    """Verify every drafted token."""

    name = "full"

    def plan(self, batch: Batch) -> Plan:
        """Draft, and admit everything."""
        return _everything(batch, self.name)

    def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
        """G + 1 for every request."""
        requests, gamma = confidence_RG.shape
        return np.full(requests, gamma + 1, dtype=np.int32)


class OffPolicy(_Unlearning):
    """Plain decoding: no draft pass."""

    name = "off"

    def plan(self, batch: Batch) -> Plan:
        """Don't draft."""
        return Plan(False, 0.0, 0, self.name, float(batch.requests), math.nan)

    def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
        """1 for every request: the anchor."""
        return np.ones(batch.requests, dtype=np.int32)


class ThresholdPolicy(_Unlearning):
    """Verify a position while its survival a_k = c_1 * ... * c_k is at least a fixed threshold."""

    name = "threshold"

    def __init__(
        self, threshold: float, calibrate: Calibrate | None = None, line_2BG: np.ndarray | None = None
    ) -> None:
        """`line_2BG`: what `calibrate` does, as `Terms` have it."""
        self.threshold = threshold
        self._calibrate = calibrate
        self._line_2BG = line_2BG

    def plan(self, batch: Batch) -> Plan:
        """Draft, at the threshold as price."""
        return _everything(batch, self.name)._replace(price=self.threshold)

    def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
        """Requests weigh alike."""
        confidence_RG, _ = calibrated(confidence_RG, batch.temperature_R, self._calibrate)
        return admit(values(confidence_RG), plan.price, confidence_RG.size)

    def terms(self, batch: Batch) -> Terms | None:
        """Requests weigh alike."""
        return None if self._line_2BG is None else Terms(np.ones(batch.requests, dtype=np.float32), self._line_2BG)


class Algorithm1Policy(_Unlearning):
    """Algorithm 1 of the DSpark paper: admit by survival, one position at a time, until the rate first drops.

    Theta = tau / step time. Early stopping makes this round's confidences safe to use: whether a position is admitted
    depends on those ranked above it only.
    """

    name = "algorithm1"

    def __init__(self, cost: CostModel, calibrate: Calibrate | None = None) -> None:
        self._cost = cost
        self._calibrate = calibrate

    def plan(self, batch: Batch) -> Plan:
        """Draft; the amount is decided with the confidences at hand."""
        if not self._cost.known:
            return _everything(batch, "no-cost-data")
        # At price 0 the engine verifies everything and asks no further.
        return _everything(batch, self.name)._replace(price=sys.float_info.min)

    def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
        """Full verification while there is no data to tell the step time from."""
        confidence_RG, _ = calibrated(confidence_RG, batch.temperature_R, self._calibrate)
        requests, gamma = confidence_RG.shape
        if requests == 0 or not self._cost.known:
            return np.full(requests, gamma + 1, dtype=np.int32)
        flat = values(confidence_RG).ravel()
        order = np.argsort(-flat, kind="stable")
        tokens_N = np.arange(requests, requests + flat.size + 1)
        context = int(batch.context_R.sum())
        verify_N = self._cost.verify(requests, tokens_N, context, batch.sampled)
        seconds_N = self._cost.draft(requests, batch.sampled) + verify_N
        tau_N = requests + np.concatenate(([0.0], np.cumsum(flat[order], dtype=np.float64)))
        theta_N = tau_N / seconds_N
        drops = np.flatnonzero(theta_N[1:] < theta_N[:-1])
        admitted = int(drops[0]) if drops.size else flat.size
        return (1 + np.bincount(order[:admitted] % requests, minlength=requests)).astype(np.int32)


def _everything(batch: Batch, reason: str) -> Plan:
    """Draft and verify whatever the policy admits."""
    return Plan(True, 0.0, np.iinfo(np.int32).max, reason, math.nan, math.nan)
