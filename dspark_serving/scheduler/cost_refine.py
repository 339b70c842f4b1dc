"""Keeps predicted times true while the engine runs: robust multiplicative corrections, learned from every round."""

from __future__ import annotations

import math

import numpy as np

SHARED_GAIN = 0.06
LOCAL_GAIN = 0.1
MOVE_GAIN = 0.04
"""Share of the visited node's local correction that moves into the shared one, out of all nodes visited lately: they
predict what they did, and what they have in common reaches the nodes that are not visited."""
FORGET = 1 / 50
"""How fast a node stops counting as visited, per round: then it follows the shared correction again."""
FADE = 1 / 200
"""How fast an upward correction of a node that is not visited goes, per round: else a cost learned in a bad hour could
keep its totals from ever being visited again. One that is too low gets visited, and learns."""
SCALE_GAIN = 0.04
TREND_GAIN = 1 / 32
CLIP = 1.2
"""Residuals count up to this many standard deviations: a slow outlier weighs no more than an ordinary late round."""
TREND_CLIP = 4.0
"""Added to `CLIP` when the residuals all point one way: then it is the machine that changed, not some rounds."""
MIN_SCALE, MAX_SCALE = 0.01, 0.5
REACH = 0.7
"""Distance (octaves) over which a residual is shared with neighbouring nodes; the kernel is Gaussian."""
DOUBT_PER_OCTAVE = 0.1
"""Relative error expected one octave away from the nearest measured node."""
UNTRIED = 0.25
"""By how much less than predicted a round may take at a node that was never visited: a tenant during the start-up
profile does not show in its spread."""


class Refiner:
    """Log corrections at N nodes: one that all nodes share (the machine's speed) plus a local deviation each."""

    def __init__(self, coordinates_ND: np.ndarray, scale: float, *, stepped: bool = False) -> None:
        """Nodes without experience.

        Args:
            coordinates_ND: octaves.
            scale: relative standard deviation to expect of a measured time.
            stepped: each node costs what it costs; else they are points of smooth curves, whose slopes matter.
        """
        self.coordinates_ND = coordinates_ND
        self.shared = 0.0
        self.local_N = np.zeros(len(coordinates_ND))
        self.spread_N = np.full(len(coordinates_ND), np.inf)  # of the residuals at each node; inf: never measured
        self._visited_N = np.zeros(len(coordinates_ND))  # 1 just now, 0 long ago
        self._visits_N = np.zeros(len(coordinates_ND))
        self._scale = min(max(scale, MIN_SCALE), MAX_SCALE)
        self._trend = 0.0
        self._stepped = stepped
        self._before = 0.0  # the residual of the round before
        distance2_NN = ((coordinates_ND[:, None] - coordinates_ND[None]) ** 2).sum(axis=2)
        self._kernel_NN = np.exp(-0.5 * distance2_NN / REACH**2)

    def mark_measured(self, node: int) -> None:
        """Note that `node` was measured before, with the spread to be expected."""
        self.spread_N[node] = self._scale

    def observe(self, node: int, residual: float) -> None:
        """Learn from log(measured / predicted) at a node."""
        scale = self._scale
        self._trend += TREND_GAIN * (min(max(residual / scale, -1.0), 1.0) - self._trend)
        limit = scale * (CLIP + TREND_CLIP * self._trend**2)
        step = min(max(residual, -limit), limit)
        # Follows the median of |residual|, which is 0.6745 standard deviations and which outliers hardly move.
        scale *= math.exp(SCALE_GAIN if abs(residual) > 0.6745 * scale else -SCALE_GAIN)
        self._scale = min(max(scale, MIN_SCALE), MAX_SCALE)
        self.shared += SHARED_GAIN * step
        kernel_N = self._kernel_NN[node]
        self.local_N += LOCAL_GAIN * step * kernel_N
        if self._stepped:
            self._believe(node, residual - min(self._before, 0.0), step)
            self._before = residual
        self._visits_N[node] += 1.0
        self._visited_N *= 1 - FORGET
        np.maximum(self._visited_N, kernel_N, out=self._visited_N)
        moved = MOVE_GAIN * float(self.local_N[node])
        self.shared += moved
        self.local_N -= moved * self._visited_N
        self.local_N *= np.where(self.local_N > 0, 1 - FADE * (1 - self._visited_N), 1.0)
        spread = float(self.spread_N[node])
        self.spread_N[node] = self._scale if spread == math.inf else spread + 0.1 * (1.25 * abs(step) - spread)

    def _believe(self, node: int, residual: float, learned: float) -> None:
        """Rounds at a new node, faster than the one before let expect, tell it all: no accident makes them so."""
        extra = max(residual, -UNTRIED) - learned
        self.local_N[node] += min(extra, 0.0) / (1.0 + self._visits_N[node])

    def doubt(self, nodes_N: np.ndarray) -> np.ndarray:
        """Share of its predicted time by which a round at each of these nodes may be faster."""
        return UNTRIED / (1.0 + self._visits_N[nodes_N])

    def sureness(self, point_D: np.ndarray) -> float:
        """Relative standard deviation at a point: that of the best measured node, and doubt by distance."""
        distance2_N = ((self.coordinates_ND - point_D) ** 2).sum(axis=1)
        return math.sqrt(float((self.spread_N**2 + DOUBT_PER_OCTAVE**2 * distance2_N).min()))
