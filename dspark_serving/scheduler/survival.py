"""What the drafter's confidences say, and what earlier rounds say before this round's confidences are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from dspark_serving.scheduler.round import Batch

Calibrate = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(confidence_RG, temperature_R) -> calibrated confidence_RG."""

_ONE = np.float32(1.0).view(np.uint32)


class Recalibration(Protocol):
    """A calibration that learns from what became of the drafts."""

    @property
    def line_2BG(self) -> np.ndarray:
        """Factor and addend of raw logits for each temperature band and position, float32: what `apply` does."""
        ...

    def apply(self, confidence_RG: np.ndarray, temperature_R: np.ndarray) -> np.ndarray:
        """Calibrated confidences, [R, G]."""
        ...

    def observe(
        self, confidence_RG: np.ndarray, verify_lens_R: np.ndarray, accepted_R: np.ndarray, temperature_R: np.ndarray
    ) -> None:
        """Learn from a finished round."""
        ...


def sanitise(confidence_RG: np.ndarray) -> tuple[np.ndarray, int]:
    """Confidences in [0, 1] as float32, and how many were not: those count as 1.

    A drafter that cannot judge a position leaves it to the target; a later position does not change an earlier one,
    so this is causal.
    """
    confidence_RG = np.asarray(confidence_RG, dtype=np.float32)
    if confidence_RG.size == 0:
        return confidence_RG, 0
    # As integers the floats from 0 to 1 are in order, and those that are negative, larger or NaN lie above.
    in_memory = confidence_RG.T if confidence_RG.flags.f_contiguous else confidence_RG  # a fifth of the time
    if np.maximum.reduce(in_memory.view(np.uint32), axis=None) <= _ONE:
        return confidence_RG, 0
    good_RG = (confidence_RG >= 0.0) & (confidence_RG <= 1.0)
    return np.where(good_RG, confidence_RG, np.float32(1.0)), int(good_RG.size - np.count_nonzero(good_RG))


def calibrated(
    confidence_RG: np.ndarray, temperature_R: np.ndarray, calibrate: Calibrate | None
) -> tuple[np.ndarray, int]:
    """Calibrated confidences in [0, 1], and how many of the raw ones were unusable."""
    confidence_RG, bad = sanitise(confidence_RG)
    if calibrate is None or confidence_RG.size == 0:
        return confidence_RG, bad
    return sanitise(calibrate(confidence_RG, temperature_R))[0], bad


class AcceptancePrior:
    """Conditional acceptance of each position over recent traffic: what is expected of a request not seen yet.

    A position is a label only when it was verified and everything before it was accepted. The scheduler verifies what
    looks promising, so labels alone would flatter the rest: the position that a request's cut fell on counts with its
    calibrated confidence, and those behind it with the chance of being reached.
    """

    def __init__(self, gamma: int, *, acceptance: float = 0.6, strength: float = 4.0, memory: float = 512.0) -> None:
        """Starts at `acceptance` with the weight of `strength` labels; forgets over about `memory` requests' rounds."""
        self._start = np.full(gamma, acceptance * strength)
        self._strength = strength
        self._memory = memory
        self._trials_G = np.zeros(gamma)
        self._accepted_G = np.zeros(gamma)
        self._positions_G = np.arange(gamma)
        self.survival_G = self._survival()

    def observe(self, calibrated_RG: np.ndarray, verify_lens_R: np.ndarray, accepted_R: np.ndarray) -> None:
        """Learn from a drafting round; `calibrated_RG` in [0, 1]."""
        verified_RG = self._positions_G < (verify_lens_R - 1)[:, None]
        reached_RG = self._positions_G <= accepted_R[:, None]
        label_RG = verified_RG & reached_RG
        success_RG = self._positions_G < accepted_R[:, None]
        # Behind the cut of a request whose verified drafts were all accepted: reached with the drafter's own chance.
        open_RG = ~verified_RG & (accepted_R >= verify_lens_R - 1)[:, None]
        factor_RG = np.where(open_RG, calibrated_RG, 1.0)
        survived_RG = np.multiply.accumulate(factor_RG, axis=1) * open_RG
        chance_RG = np.empty_like(survived_RG)
        chance_RG[:, 0] = open_RG[:, 0]
        chance_RG[:, 1:] = np.where(open_RG[:, :-1], survived_RG[:, :-1], 1.0) * open_RG[:, 1:]
        keep = np.exp(-len(accepted_R) / self._memory)
        self._trials_G = keep * self._trials_G + (label_RG + chance_RG).sum(axis=0)
        self._accepted_G = keep * self._accepted_G + ((label_RG & success_RG) + survived_RG).sum(axis=0)
        self.survival_G = self._survival()

    def doubt(self, labels: float) -> None:
        """Weigh everything learned like at most `labels` labels: what comes next counts more."""
        scale = min(1.0, labels / max(float(self._trials_G[0]), 1e-9))
        self._trials_G *= scale
        self._accepted_G *= scale

    def _survival(self) -> np.ndarray:
        conditional_G = (self._start + self._accepted_G) / (self._strength + self._trials_G)
        return np.cumprod(conditional_G).astype(np.float32)


class HostHistory:
    """The last calibrated survivals of each slot, dropped when the slot goes to another request or nothing drafts.

    Small batches are judged by several rounds of each request, so that the price does not chase one round; a large
    batch is a fair sample by itself.
    """

    def __init__(self, gamma: int, slots: int, *, depth: int = 32, stale_after: int = 256) -> None:
        """`depth` rounds are kept a slot, for at least `stale_after` rounds without a draft and at most twice that."""
        self._depth = depth
        self._stale_after = stale_after
        self._rows = np.zeros((slots * depth, gamma), dtype=np.float32)
        self._latest = np.zeros((slots, gamma), dtype=np.float32)
        self._written = np.zeros(slots, dtype=np.int64)
        self._generation = np.full(slots, -1, dtype=np.int64)  # -1: nothing is known
        self._round = np.zeros(slots, dtype=np.int64)
        self._now = 0

    def observe(self, batch: Batch, survival_RG: np.ndarray) -> None:
        """Keep this round's survivals."""
        slots_R = batch.slots_R
        written_R = np.where(self._known(batch), self._written[slots_R], 0)
        self._rows[slots_R * self._depth + written_R % self._depth] = survival_RG
        self._latest[slots_R] = survival_RG
        self._written[slots_R] = written_R + 1
        self._generation[slots_R] = batch.generations_R
        self._round[slots_R] = self._now

    def pass_round(self) -> None:
        """A round went by, with or without a draft."""
        self._now += 1
        if self._now % self._stale_after == 0:
            self._generation[self._round < self._now - self._stale_after] = -1

    def forget(self) -> None:
        """Drop all rows: the prior stands in for every request."""
        self._generation.fill(-1)

    def newcomers(self, batch: Batch) -> int:
        """Requests for which nothing was drafted lately."""
        return batch.requests - int(np.count_nonzero(self._known(batch)))

    def sample(self, batch: Batch, fewest: int, most: int, prior_G: np.ndarray, step: int = 1) -> np.ndarray:
        """Survivals of earlier rounds of every `step`-th request, the latest first, [S, H, G] float32.

        Another `step`-th of the requests is taken each round. H is as many rounds as are known of any of them, within
        `fewest` and `most` (and the depth). Rounds of a request that are not known have the prior's survivals instead.
        """
        chosen = slice(self._now % step, None, step)
        slots_S = batch.slots_R[chosen]
        known_S = self._generation.take(slots_S) == batch.generations_R[chosen]
        if most == 1:
            rows_SG = self._latest.take(slots_S, axis=0)
            if np.count_nonzero(known_S) < len(slots_S):
                rows_SG[~known_S] = prior_G
            return rows_SG[:, None]
        depth_S = self._written[slots_S] * known_S
        rounds = min(max(int(depth_S.max()), fewest), most, self._depth)
        back_H = np.arange(1, rounds + 1)
        row_SH = slots_S[:, None] * self._depth + (self._written[slots_S][:, None] - back_H) % self._depth
        rows_SHG = self._rows.take(row_SH, axis=0)
        rows_SHG[depth_S[:, None] < back_H] = prior_G
        return rows_SHG

    def _known(self, batch: Batch) -> np.ndarray:
        """Whether the slot's rows belong to this request, [R] bool."""
        known_R: np.ndarray = self._generation.take(batch.slots_R) == batch.generations_R
        return known_R
