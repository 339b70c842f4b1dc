"""Speed floors of single requests: weights from measured speeds, and the totals that keep them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dspark_serving.scheduler.round import Batch

_MOST = 8.0
"""The largest factor on a weight; a floor that cannot be met must not starve the others altogether."""


class Demands(NamedTuple):
    """What single requests are owed in a round."""

    floor_R: np.ndarray | None  # tokens a second that each should get; None when none has a floor
    weight_R: np.ndarray | None  # float32: what a token of each counts; None when all count 1


class SpeedFloors:
    """Tokens a second of each request against the least it should get, from earlier rounds only."""

    def __init__(self, slots: int, *, everyone: float = 0.0, memory: float = 32.0) -> None:
        """`everyone`: tokens a second that any request should get; speeds are means over about `memory` rounds."""
        self._everyone = everyone
        self._keep = 1.0 - 1.0 / memory
        self._tokens = np.zeros(slots)
        self._seconds = np.zeros(slots)
        self._generation = np.full(slots, -1, dtype=np.int64)
        # The arrays last seen to ask for nothing: a batch brings the same ones as long as it has the same members.
        self._ordinary_weight_R: np.ndarray | None = None
        self._ordinary_floor_R: np.ndarray | None = None

    def demands(self, batch: Batch) -> Demands:
        """What is asked for in this batch; nothing, as a rule."""
        if batch.weight_R is self._ordinary_weight_R and batch.floor_R is self._ordinary_floor_R:
            return Demands(None, None)
        floors = self._everyone > 0.0 or np.count_nonzero(batch.floor_R) > 0
        if not floors and not np.count_nonzero(batch.weight_R != 1.0):
            self._ordinary_weight_R, self._ordinary_floor_R = batch.weight_R, batch.floor_R
            return Demands(None, None)
        floor_R = np.maximum(np.nan_to_num(batch.floor_R), self._everyone) if floors else None
        usable_R = np.isfinite(batch.weight_R) & (batch.weight_R > 0)
        weight_R = np.where(usable_R, batch.weight_R, 1.0)
        if floor_R is not None:
            slots_R = batch.slots_R
            known_R = (self._generation[slots_R] == batch.generations_R) & (self._tokens[slots_R] > 0)
            ratio_R = floor_R * self._seconds[slots_R] / np.where(known_R, self._tokens[slots_R], 1.0)
            weight_R = weight_R * np.where(known_R, np.clip(ratio_R, 1.0, _MOST), 1.0)
        return Demands(floor_R, weight_R.astype(np.float32))

    def observe(self, batch: Batch, tokens_R: np.ndarray, seconds: float) -> None:
        """Tokens that each request got in a round."""
        slots_R = batch.slots_R
        keep_R = self._keep * (self._generation[slots_R] == batch.generations_R)
        self._tokens[slots_R] = keep_R * self._tokens[slots_R] + tokens_R
        self._seconds[slots_R] = keep_R * self._seconds[slots_R] + seconds
        self._generation[slots_R] = batch.generations_R


def worst_share(
    floor_R: np.ndarray, survival_RHG: np.ndarray, value_RHG: np.ndarray, cut_N: np.ndarray, seconds_N: np.ndarray
) -> np.ndarray:
    """Predicted speed by floor of the worst-served request, [N], when values of at least cut_N are verified."""
    bound_R = floor_R > 0
    survival_FHG, value_FHG = survival_RHG[bound_R], value_RHG[bound_R]
    verified_FHGN = value_FHG[..., None] >= cut_N
    tokens_FN = 1.0 + np.einsum("fhg,fhgn->fn", survival_FHG, verified_FHGN) / survival_RHG.shape[1]
    share_N: np.ndarray = (tokens_FN / (floor_R[bound_R, None] * seconds_N)).min(axis=0)
    return share_N
