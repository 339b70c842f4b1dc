"""The amount of verification, from old information: the total with the best rate, and the price that goes with it.

Theta(B) = (anchors + value of the B - R best drafts) / seconds(B), over the totals B worth comparing (DSpark paper,
section 4.3, with seconds that also know the draft pass and the context); rho = max Theta.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dspark_serving.scheduler.admission import Totals, gain_curve
from dspark_serving.scheduler.floors import worst_share


class Prospect(NamedTuple):
    """What earlier rounds say of a batch: H earlier rounds of each of its R requests, or of a sample of them (S)."""

    requests: int  # R
    survival_SHG: np.ndarray  # float32, calibrated; S = R where there are weights or floors
    weight_R: np.ndarray | None  # None: all 1
    floor_R: np.ndarray | None  # tokens a second; None: no floors
    realism: float  # accepted drafts by expected ones
    totals: Totals
    seconds_N: np.ndarray  # of a drafting round, for each total
    plain_seconds: float  # of a round without drafts
    tiered: bool  # tokens within a tier cost nothing


class Outlook(NamedTuple):
    """The best drafting round."""

    price: float
    capacity: int
    reason: str
    tokens: float  # expected, bonus tokens included
    seconds: float
    advantage: float  # its rate by plain decoding's; where one of them breaks a floor, by what they keep of it


def weigh(prospect: Prospect) -> Outlook:
    """Price and capacity of the batch's next drafting round."""
    weight_R, value_SHG = prospect.weight_R, prospect.survival_SHG
    anchors = float(prospect.requests)
    if weight_R is not None:
        anchors = float(weight_R.sum(dtype=np.float64))
        value_SHG = value_SHG * weight_R[:, None, None]
    return _everything(prospect, value_SHG, anchors) or _best_total(prospect, value_SHG, anchors)


def _everything(prospect: Prospect, value_SHG: np.ndarray, anchors: float) -> Outlook | None:
    """The whole window, where even the least of it pays; without sorting anything."""
    total_N, drafts_N, step_M = prospect.totals
    whole = prospect.requests * value_SHG.shape[-1]
    if prospect.floor_R is not None or drafts_N[-1] < whole:
        return None
    smallest = prospect.realism * float(np.minimum.reduce(value_SHG[..., -1], axis=None))
    seconds = float(prospect.seconds_N[-1])
    steepest = 0.0
    if len(total_N) > 1:
        mean_slope = (seconds - float(prospect.seconds_N[0])) / int(drafts_N[-1] - drafts_N[0])
        if anchors / seconds * mean_slope > smallest:  # no more than the steepest one; most rounds under load end here
            return None
        slope_M = prospect.seconds_N[1:] - prospect.seconds_N[:-1]
        slope_M /= step_M
        steepest = float(np.maximum.reduce(slope_M))
    if anchors / seconds * steepest > smallest:
        return None
    value = anchors + prospect.realism * whole / value_SHG.size * float(np.add.reduce(value_SHG, axis=None))
    rate = value / seconds
    # If every step up to it pays at the rate of the whole window, then no smaller total has a better rate.
    if rate * steepest > smallest:
        return None
    advantage = rate * prospect.plain_seconds / anchors
    tokens = value if prospect.weight_R is None else _tokens(prospect, value_SHG, -math.inf)
    return Outlook(0.0, whole, "bypass", tokens, seconds, advantage)


def _best_total(prospect: Prospect, value_SHG: np.ndarray, anchors: float) -> Outlook:
    """The total with the best rate, and the price of a token around it."""
    total_N, drafts_N, _ = prospect.totals
    seconds_N = prospect.seconds_N
    whole = prospect.requests * value_SHG.shape[-1]
    times = value_SHG.size / whole  # values a drafted token of the batch
    scale = prospect.realism / times
    sorted_value = value_SHG.flatten()
    sorted_value.sort()
    take_N = (drafts_N * times).astype(np.int64)
    gain = gain_curve(sorted_value)
    value_N = anchors + scale * gain.take(take_N)
    rate_N = value_N / seconds_N
    plain_rate = anchors / prospect.plain_seconds
    if prospect.floor_R is None:
        best, share, plain_share = int(rate_N.argmax()), math.inf, math.inf
    else:
        best, share, plain_share = _within_floors(prospect, prospect.floor_R, value_SHG, sorted_value, rate_N)
    capacity = int(drafts_N[best])
    if prospect.tiered:
        price, worth, seconds = 0.0, int(take_N[best]), float(seconds_N[best])
        value = float(value_N[best])
    else:
        low, high = max(best - 1, 0), min(best + 1, len(total_N) - 1)
        slope = max(float((seconds_N[high] - seconds_N[low]) / (total_N[high] - total_N[low])), 0.0)
        price = max(float(rate_N[best]), plain_rate) * slope / prospect.realism
        worth = sorted_value.size - int(sorted_value.searchsorted(np.float32(price)))
        value = anchors + scale * float(gain[worth])
        seconds = float(seconds_N[best]) + slope * (worth / times - capacity)
        if prospect.floor_R is None:
            capacity = whole
    reason = "floor-unmet" if share < 1.0 else "tier" if prospect.tiered else "price"
    advantage = value / seconds / plain_rate
    if min(share, plain_share) < 1.0:  # a floor goes before the rate
        advantage = min(share, 1.0) / min(plain_share, 1.0)
    tokens = value
    if prospect.weight_R is not None:
        tokens = _tokens(prospect, value_SHG, sorted_value[-worth] if worth else math.inf)
    return Outlook(price, capacity, reason, tokens, seconds, advantage)


def _tokens(prospect: Prospect, value_SHG: np.ndarray, least: float) -> float:
    """Expected tokens, each counting 1, when all values of at least `least` are verified."""
    drafts = float(np.where(value_SHG >= least, prospect.survival_SHG, 0.0).sum(axis=-1).mean())
    return prospect.requests * (1.0 + prospect.realism * drafts)


def _within_floors(
    prospect: Prospect, floor_R: np.ndarray, value_RHG: np.ndarray, sorted_value: np.ndarray, rate_N: np.ndarray
) -> tuple[int, float, float]:
    """The best total that keeps every floor, else the one nearest to that; the share of its floor that the worst-served
    request gets there, and from plain decoding.
    """
    rounds = value_RHG.shape[1]
    take_N = prospect.totals.drafts_N * rounds
    cut_N = np.where(take_N > 0, sorted_value[np.minimum(sorted_value.size - take_N, sorted_value.size - 1)], np.inf)
    expected_RHG = prospect.realism * prospect.survival_SHG
    share_N = worst_share(floor_R, expected_RHG, value_RHG, cut_N, prospect.seconds_N)
    kept_N = share_N >= 1.0
    best = int(np.where(kept_N, rate_N, -np.inf).argmax()) if kept_N.any() else int(share_N.argmax())
    return best, float(share_N[best]), 1.0 / (float(floor_R.max()) * prospect.plain_seconds)
