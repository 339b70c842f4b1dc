"""Predicts the time of a round: draft pass by requests; the rest by requests, verified tokens and context.

The DSpark paper (arXiv 2607.05147) takes a step's time as a function of the verified tokens B alone, SPS(B). In an
engine, captured graphs round B up to a tier, attention reads the context, and the host works per request.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from dspark_serving.scheduler.cost_fit import CostCurves, CostSample, fit_curves, round_up
from dspark_serving.scheduler.cost_refine import Refiner

__all__ = ["CostModel", "CostSample"]

REQUEST_OCTAVES = 9
"""Corrections are kept at 1, 2, 4, ..., 256 requests."""
PLAIN_DISTANCE = 1.5
"""How far (octaves) a round without drafts lies from a drafting one of equal size."""
FAR = 1 << 24
"""Tokens beyond any batch: the end of the last, extrapolated segment."""


class CostModel:
    """Seconds of a round, fitted to profiled rounds and refined by `observe`."""

    def __init__(
        self, curves: CostCurves | None, samples: Sequence[CostSample] = (), tiers: Sequence[int] | None = None
    ) -> None:
        self.tiers = tuple(sorted(tiers)) if tiers else None
        """Captured token totals, which graphs round up to; None: eager, every total has its own cost."""
        self.samples = tuple(samples)
        """What the model was fitted to."""
        self.observed = 0
        self.rejected = 0
        """Observations with impossible times or sizes: counted, otherwise ignored."""
        self._curves = curves
        self._first_draft: float | None = None  # seconds of the first draft pass, where no profiled round drafted
        self._speed = 1.0  # of all times, by what was measured lately
        self._tier_ends = np.array([*(self.tiers or ()), 0])  # the last one: beyond all tiers, nothing rounds up
        self._rows: dict[int, np.ndarray] = {}  # by requests: until the next observation
        self._drafts: dict[int, float] = {}
        self._plains: dict[int, float] = {}
        if curves is not None:
            self._build(curves)

    @classmethod
    def fit(cls, samples: Sequence[CostSample], tiers: Sequence[int] | None = None) -> CostModel:
        """Fit to profiled rounds, `tiers` being the captured token totals (None: eager).

        Raises:
            DataError: no samples, or impossible ones.
        """
        return cls(fit_curves(samples, tiers), samples, tiers)

    @classmethod
    def unknown(cls) -> CostModel:
        """Without data: predicts nan, learns nothing."""
        return cls(None)

    @property
    def known(self) -> bool:
        """False: no data; predictions are nan."""
        return self._curves is not None

    def draft(self, requests: int, sampled: int = 0) -> float:
        """Seconds of the draft pass, `sampled` requests not being greedy; 0 until one is measured: it gets tried."""
        seconds = self._drafts.get(requests)
        if seconds is None:
            seconds = self._drafts[requests] = self._predict_draft(requests)
        return seconds + (sampled * self._curves.sampled.draft * self._speed if sampled and self._curves else 0.0)

    def verify(self, requests: int, tokens_N: np.ndarray, context: int, sampled: int = 0) -> np.ndarray:
        """Seconds of the rest of the round (verify, accept, commit, host) for each total of verified tokens.

        Args:
            tokens_N: anchors included.
            context: committed tokens, summed over the requests.
            sampled: requests that are not greedy; they are taken to have their share of the tokens.
        """
        if self._curves is None:
            return np.full(len(tokens_N), np.nan)
        if self.tiers is not None:
            tokens_N = np.maximum(tokens_N, self._tier_ends[np.searchsorted(self._tier_ends[:-1], tokens_N)])
        row_B = self._rows.get(requests)
        if row_B is None:
            row_B = self._rows[requests] = self._predict_row(self._curves, requests)
        seconds_N = np.interp(tokens_N, self._nodes_B, row_B) + self._curves.context_slope * self._speed * context
        if sampled:
            seconds_N += self._curves.sampled.verify * self._speed * sampled / requests * tokens_N
        return seconds_N

    def plain(self, requests: int, context: int, sampled: int = 0) -> float:
        """Seconds of a round without drafts."""
        if self._curves is None:
            return math.nan
        seconds = self._plains.get(requests)
        if seconds is None:
            seconds = self._plains[requests] = self._predict_plain(requests)
        return seconds + self._speed * (self._curves.context_slope * context + self._curves.sampled.plain * sampled)

    def seconds(self, requests: int, tokens: int, context: int, drafted: bool, sampled: int = 0) -> float:
        """Of a whole round, draft pass included."""
        if not drafted:
            return self.plain(requests, context, sampled)
        verify = float(self.verify(requests, np.array([tokens]), context, sampled)[0])
        return self.draft(requests, sampled) + verify

    def sureness(self, requests: int, tokens: int) -> float:
        """Relative standard deviation of `verify`'s prediction; inf without data."""
        if self._curves is None:
            return math.inf
        return self._rest.sureness(np.array([math.log2(requests), math.log2(round_up(tokens, self.tiers)), 0.0]))

    def doubt(self, requests: int, tokens_N: np.ndarray) -> np.ndarray:
        """Share of the predicted `verify` time by which rounds of these totals may be faster: less with each one."""
        if self._curves is None:
            return np.zeros(len(tokens_N))
        return self._rest.doubt(np.array([self._node(requests, int(tokens), True) for tokens in tokens_N]))

    def observe(
        self,
        requests: int,
        tokens: int,
        context: int,
        draft_seconds: float,
        seconds: float,
        drafted: bool,
        sampled: int = 0,
    ) -> None:
        """Refine from a measured round; impossible values are counted in `rejected`."""
        rest = seconds - draft_seconds if drafted else seconds
        possible = 0 < rest < math.inf and (not drafted or 0 < draft_seconds < math.inf)
        if not (possible and 1 <= requests <= tokens and context >= 0):
            self.rejected += 1
            return
        self.observed += 1
        curves = self._curves
        if curves is None:
            return
        if drafted:
            predicted = float(self.verify(requests, np.array([tokens]), context, sampled)[0])
            if curves.draft is None and self._first_draft is None:
                self._first_draft = draft_seconds * math.exp(-self._rest.shared)
                self._drafts.clear()
            self._drafting.observe(_nearest_octave(requests), math.log(draft_seconds / self.draft(requests, sampled)))
        else:
            predicted = self.plain(requests, context, sampled)
        self._rest.observe(self._node(requests, tokens, drafted), math.log(rest / predicted))
        self._speed = math.exp(self._rest.shared)
        for predictions in (self._rows, self._drafts, self._plains):
            predictions.clear()

    def _build(self, curves: CostCurves) -> None:
        """Lay out the nodes that carry corrections: requests x tokens, then plain rounds by requests."""
        self._nodes = nodes = self.tiers or _eager_nodes(curves.verify.xs)
        self._base_B = np.array([curves.verify(node) for node in nodes])
        self._nodes_B = np.array([*nodes, FAR], dtype=np.float64)
        octaves_M = range(REQUEST_OCTAVES)
        drafting = [(octave, math.log2(node), 0.0) for octave in octaves_M for node in nodes]
        plain = [(octave, octave, PLAIN_DISTANCE) for octave in octaves_M]
        scale = 1.4826 * float(np.median(np.abs(curves.relative_residuals_N)))
        self._rest = Refiner(np.array(drafting + plain, dtype=np.float64), scale, stepped=self.tiers is not None)
        self._drafting = Refiner(np.array(octaves_M, dtype=np.float64)[:, None], 2 * scale)
        self._local_MB = self._rest.local_N[: len(drafting)].reshape(REQUEST_OCTAVES, len(nodes))  # views, which
        self._plain_M = self._rest.local_N[len(drafting) :]  # follow the refiner
        for sample in self.samples:
            self._rest.mark_measured(self._node(sample.requests, sample.tokens, sample.drafted))

    def _predict_draft(self, requests: int) -> float:
        if self._curves is None:
            return math.nan
        seconds = self._first_draft if self._curves.draft is None else self._curves.draft(requests)
        if seconds is None:
            return 0.0
        correction = self._rest.shared + self._drafting.shared + _between_octaves(self._drafting.local_N, requests)
        return seconds * math.exp(correction)

    def _predict_plain(self, requests: int) -> float:
        """Without the context."""
        if self._curves is None or self._curves.plain is None:
            return float(self.verify(requests, np.array([requests]), 0)[0])
        correction = self._rest.shared + _between_octaves(self._plain_M, requests)
        base = self._curves.plain(round_up(requests, self.tiers)) + self._curves.host(requests)
        return base * math.exp(correction)

    def _predict_row(self, curves: CostCurves, requests: int) -> np.ndarray:
        """Seconds at every node and at `FAR`, without the context."""
        low, share = _octaves_around(requests)
        local_B = self._local_MB[low] + share * (self._local_MB[low + 1] - self._local_MB[low])
        factor_B = np.exp(self._rest.shared + local_B)
        raw_B = (self._base_B + curves.host(requests)) * factor_B
        # The middle of the closest non-decreasing curves above and below: equal to raw_B where that is monotone.
        above_B, below_B = np.maximum.accumulate(raw_B), np.minimum.accumulate(raw_B[::-1])[::-1]
        row_B = np.empty(len(raw_B) + 1)
        np.add(above_B, below_B, out=row_B[:-1])
        row_B[:-1] *= 0.5
        row_B[-1] = row_B[-2] + curves.verify.last_slope * factor_B[-1] * (FAR - self._nodes_B[-2])
        return row_B

    def _node(self, requests: int, tokens: int, drafted: bool) -> int:
        """Index of the node nearest to a round."""
        octave, columns = _nearest_octave(requests), len(self._base_B)
        if not drafted:
            return REQUEST_OCTAVES * columns + octave
        right = min(bisect_left(self._nodes, tokens), columns - 1)
        left = max(right - 1, 0)
        closer_left = self.tiers is None and tokens**2 < self._nodes[left] * self._nodes[right]
        return octave * columns + (left if closer_left else right)


def _eager_nodes(profiled: list[float]) -> tuple[float, ...]:
    """The profiled totals, and half octaves from 1 to twice the last of them."""
    halves = {float(round(2 ** (half / 2))) for half in range(2 * math.ceil(math.log2(profiled[-1])) + 3)}
    return tuple(sorted(halves.union(profiled)))


def _nearest_octave(requests: int) -> int:
    return min(round(math.log2(requests)), REQUEST_OCTAVES - 1)


def _octaves_around(requests: int) -> tuple[int, float]:
    """Index of the octave below and how far towards the next one."""
    octave = min(math.log2(requests), REQUEST_OCTAVES - 1)
    low = min(int(octave), REQUEST_OCTAVES - 2)
    return low, octave - low


def _between_octaves(local_M: np.ndarray, requests: int) -> float:
    low, share = _octaves_around(requests)
    return float(local_M[low] + share * (local_M[low + 1] - local_M[low]))
