"""Speed floors of single requests: weights from measured speeds, and the totals that keep them."""

from __future__ import annotations

import numpy as np

from dspark_serving.scheduler.round import Batch

_MOST = 8.0
"""The largest factor on a weight; a floor that cannot be met must not starve the others altogether."""


class SpeedFloors:
    """Tokens a second of each request against the least it should get, from earlier rounds only."""

    def __init__(self, slots: int, *, everyone: float = 0.0, memory: float = 32.0) -> None:
        """`everyone`: tokens a second that any request should get; speeds are means over about `memory` rounds."""
        self._everyone = everyone
        self._keep = 1.0 - 1.0 / memory
        self._tokens = np.zeros(slots)
        self._seconds = np.zeros(slots)
        self._generation = np.full(slots, -1, dtype=np.int64)

    def of(self, batch: Batch) -> np.ndarray | None:
        """Tokens a second that each request should get, [R]; None when no request has a floor."""
        if self._everyone <= 0.0 and not np.count_nonzero(batch.floor_R):
            return None
        floor_R: np.ndarray = np.maximum(np.nan_to_num(batch.floor_R), self._everyone)
        return floor_R

    def weights(self, batch: Batch, floor_R: np.ndarray | None) -> np.ndarray | None:
        """What a token of each request counts, given `of(batch)`, [R] float32; None when all count 1."""
        if floor_R is None and not np.count_nonzero(batch.weight_R != 1.0):
            return None
        usable_R = np.isfinite(batch.weight_R) & (batch.weight_R > 0)
        weight_R = np.where(usable_R, batch.weight_R, 1.0)
        if floor_R is not None:
            slots_R = batch.slots_R
            known_R = (self._generation[slots_R] == batch.generations_R) & (self._tokens[slots_R] > 0)
            ratio_R = floor_R * self._seconds[slots_R] / np.where(known_R, self._tokens[slots_R], 1.0)
            weight_R = weight_R * np.where(known_R, np.clip(ratio_R, 1.0, _MOST), 1.0)
        return weight_R.astype(np.float32)

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
