"""From values to verify lengths: admission by price and capacity, and what each capacity would be worth.

Values are laid out position by position, value_GR[k, r] = weight_r * a_{r,k+1}, with the prefix survival a of the
DSpark paper (section 4). A column never rises, so whatever is admitted from the top is a prefix of each block, and the
flat order of equal values is (position, request): ties are never broken by the value of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_EAGER_TOTALS = 24
"""Totals that are compared where every number of tokens has a cost of its own."""


def values(confidence_RG: np.ndarray, weight_R: np.ndarray | None = None) -> np.ndarray:
    """weight * survival, [G, R] float32, of confidences in [0, 1]; weights of 1 may be left out."""
    value_GR = np.array(confidence_RG.T, dtype=np.float32, order="C")
    before_R, *later = value_GR
    if weight_R is not None:
        np.multiply(before_R, weight_R, out=before_R)
    for this_R in later:  # row by row: several times as fast as accumulating along the block
        before_R = np.multiply(before_R, this_R, out=this_R)
    return value_GR


def admit(value_GR: np.ndarray, price: float, capacity: int) -> np.ndarray:
    """Verify lengths [R] int32 in 1..G+1: every position worth the price, of them the `capacity` best.

    Best is by value descending, then position, then request. Causal: the earlier positions of a block rank above the
    position and its later ones below, so no later position has a say in whether it is admitted.
    """
    gamma, requests = value_GR.shape
    if price <= 0.0 and capacity >= gamma * requests:
        return np.full(requests, gamma + 1, dtype=np.int32)
    admitted_GR = value_GR >= np.float32(price)
    if capacity < value_GR.size and np.count_nonzero(admitted_GR) > capacity:
        admitted_GR = _best(value_GR, max(capacity, 0))
    lens_R: np.ndarray = np.add.reduce(admitted_GR, axis=0, dtype=np.int32)
    lens_R += 1
    return lens_R


def _best(value_GR: np.ndarray, capacity: int) -> np.ndarray:
    """The `capacity` best values, 0 <= capacity < G*R, as a mask [G, R]."""
    if capacity == 0:
        return np.zeros(value_GR.shape, dtype=bool)
    flat = value_GR.ravel()
    cut = np.partition(flat, flat.size - capacity)[flat.size - capacity]
    best = flat > cut
    free = capacity - np.count_nonzero(best)
    best[np.flatnonzero(flat == cut)[:free]] = True
    return best.reshape(value_GR.shape)


class Totals(NamedTuple):
    """The numbers of verified tokens, anchors included, between which a batch of R requests chooses."""

    total_N: np.ndarray  # int64, ascending, the smallest >= R and the largest <= R * (G + 1)
    drafts_N: np.ndarray  # total_N - R
    step_M: np.ndarray  # from each total to the next, M = N - 1


def candidate_totals(requests: int, gamma: int, tiers: tuple[int, ...] | None) -> Totals:
    """Ends of the graph tiers that hold at least the anchors, or a grid where there are no tiers.

    Within a tier all totals cost the same, so only its end can be best (DSpark paper, section 5.2).
    """
    most = requests * (gamma + 1)
    if tiers is None:
        count = min(requests * gamma + 1, _EAGER_TOTALS)
        total_N = np.linspace(requests, most, count).round().astype(np.int64)
    else:
        ends = np.asarray(tiers, dtype=np.int64)
        total_N = np.unique(np.minimum(ends[ends >= requests], most))
        if total_N.size == 0:
            total_N = np.array([most], dtype=np.int64)
    return Totals(total_N, total_N - requests, total_N[1:] - total_N[:-1])


def gain_curve(sorted_value: np.ndarray) -> np.ndarray:
    """Sums of the n largest of the values, n = 0..size, [size + 1] float64.

    Args:
        sorted_value: ascending, one-dimensional.
    """
    sums = np.zeros(sorted_value.size + 1)
    np.add.accumulate(sorted_value[::-1], dtype=np.float64, out=sums[1:])
    return sums
