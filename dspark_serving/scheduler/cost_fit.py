"""From a few noisy step times to monotone cost curves."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dspark_serving.errors import DataError

SMOOTHNESS = 0.02
"""Weight of a change of slope between neighbouring segments, beside relative residuals: settles only what the samples
leave open."""
HOST_RIDGE = 0.003
"""Weight that prefers tokens over requests as the explanation of a cost, where both would do."""
CONTEXT_RIDGE = 0.15
"""The same for context, stronger: contexts that hardly differ must not end in a slope that long contexts multiply."""
LEAST_LEVEL = 0.1
"""Of the fastest sample, at least, is the cost of the fewest tokens: predictions stay positive."""
REWEIGHTINGS = 8
MIN_SPREAD = 0.005
SHORTEST, LONGEST = 1e-7, 1e5
"""Seconds that a round can take."""
MOST_CONTEXT = 1 << 40
MAX_KNOTS = 32
"""Of a curve: more distinct sizes than these share segments."""


class CostSample(NamedTuple):
    """One measured round."""

    requests: int
    tokens: int  # verified, anchors included
    context: int  # committed tokens, summed over the requests
    draft_seconds: float  # 0 when drafted is False
    seconds: float  # of the whole round, draft pass included
    drafted: bool
    sampled: int = 0  # requests that are not greedy


class Curve:
    """Non-decreasing and piecewise linear; goes on with the outermost slopes, never below half of its first value."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.xs = [float(x) for x in xs]
        self.ys = [float(y) for y in ys]

    def __call__(self, x: float) -> float:
        xs, ys = self.xs, self.ys
        if len(xs) == 1:
            return ys[0]
        right = min(max(bisect_right(xs, x), 1), len(xs) - 1)
        left = right - 1
        y = ys[left] + (ys[right] - ys[left]) * (x - xs[left]) / (xs[right] - xs[left])
        return max(y, 0.5 * ys[0])

    @property
    def last_slope(self) -> float:
        """Of the last segment; 0 for a single point."""
        return (self.ys[-1] - self.ys[-2]) / (self.xs[-1] - self.xs[-2]) if len(self.xs) > 1 else 0.0


class SampledCost(NamedTuple):
    """What drawing tokens from distributions adds, in seconds >= 0: softmaxes over the vocabulary, rejection."""

    draft: float = 0.0  # of a sampled request, in the draft pass
    verify: float = 0.0  # of a verified token of a sampled request
    plain: float = 0.0  # of a sampled request, in a round without drafts


class CostCurves(NamedTuple):
    """seconds = host(R) + context_slope * context, plus draft(R) + verify(B), or plain(R) in a round without drafts."""

    verify: Curve  # by verified tokens
    host: Curve  # by requests, 0 at the fewest
    context_slope: float  # >= 0, seconds per committed token of the batch
    draft: Curve | None  # by requests; None: no sample drafted
    plain: Curve | None  # by tokens (one a request); None: every sample drafted
    relative_residuals_N: np.ndarray  # measured / fitted - 1 of each greedy sample, draft pass left out
    sampled: SampledCost = SampledCost()  # on top, for requests that are not greedy


def round_up(tokens: int, tiers: Sequence[int] | None) -> int:
    """The captured total that runs this many tokens; beyond the last tier, and without tiers, the tokens themselves."""
    if not tiers or tokens > tiers[-1]:
        return tokens
    return tiers[bisect_left(tiers, tokens)]


def fit_curves(samples: Sequence[CostSample], tiers: Sequence[int] | None = None) -> CostCurves:
    """Monotone curves through the samples: robust least squares of relative errors with non-negative increments.

    Rounds with sampled requests tell what sampling adds to greedy ones; without any greedy one they are the curves.

    Args:
        samples: a few dozen; noise and some outliers are expected.
        tiers: ascending captured token totals, which the tokens are rounded up to.

    Raises:
        DataError: no samples, or one that cannot have been measured.
    """
    check_samples(samples)
    greedy = [sample for sample in samples if not sample.sampled]
    if not greedy:
        return _fit_curves(samples, tiers)
    curves = _fit_curves(greedy, tiers)
    return curves._replace(sampled=_fit_sampled(curves, [sample for sample in samples if sample.sampled], tiers))


def _fit_sampled(curves: CostCurves, samples: Sequence[CostSample], tiers: Sequence[int] | None) -> SampledCost:
    """Medians of what sampled rounds took longer than greedy ones would have."""
    draft, verify, plain = [], [], []
    for sample in samples:
        host = curves.host(sample.requests) + curves.context_slope * sample.context
        forward = curves.verify if sample.drafted or curves.plain is None else curves.plain
        more = sample.seconds - sample.draft_seconds - host - forward(round_up(sample.tokens, tiers))
        if not sample.drafted:
            plain.append(more / sample.sampled)
            continue
        verify.append(more * sample.requests / (sample.sampled * sample.tokens))
        if curves.draft is not None:
            draft.append((sample.draft_seconds - curves.draft(sample.requests)) / sample.sampled)
    parts = (draft, verify, plain or verify)  # a plain round verifies its anchors
    return SampledCost(*(max(float(np.median(part)), 0.0) if part else 0.0 for part in parts))


def _fit_curves(samples: Sequence[CostSample], tiers: Sequence[int] | None) -> CostCurves:
    requests_N, _, context_N, draft_N, seconds_N = np.array([sample[:5] for sample in samples], dtype=np.float64).T
    tokens_N = np.array([round_up(sample.tokens, tiers) for sample in samples], dtype=np.float64)
    drafted_N = np.array([sample.drafted for sample in samples])
    shared = drafted_N.any()  # without drafted samples, plain rounds (tokens = requests) are all that is known
    rest_N = seconds_N - draft_N
    in_verify_N = drafted_N if shared else np.ones_like(drafted_N)
    host_N = (requests_N == requests_N.min()) | shared  # a single point has no increments: no cost of its own
    parts = [_Part.over(tokens_N, in_verify_N), _Part.over(requests_N, host_N).without_level()]
    if shared and not drafted_N.all():
        parts.append(_Part.over(tokens_N, ~drafted_N))
    solution, fitted_N = _solve(parts, context_N, rest_N)
    verify, host, *plain = (part.curve(values) for part, values in solution.parts)
    draft = None
    if shared:
        part = _Part.over(requests_N[drafted_N], drafted_N[drafted_N])
        draft_only, _ = _solve([part], np.zeros(drafted_N.sum()), draft_N[drafted_N])
        draft = part.curve(draft_only.parts[0][1])
    else:
        plain = [verify]
    residuals_N = rest_N / fitted_N - 1
    return CostCurves(verify, host, solution.context_slope, draft, plain[0] if plain else None, residuals_N)


def check_samples(samples: Sequence[CostSample]) -> None:
    """Refuse samples that cannot have been measured.

    Raises:
        DataError: names the first one.
    """
    if not samples:
        raise DataError("no cost samples", expected="at least one measured round", fix="Measure the engine again.")
    for sample in samples:
        times = SHORTEST <= sample.seconds <= LONGEST
        draft_fits = (sample.draft_seconds > 0) == sample.drafted and 0 <= sample.draft_seconds < sample.seconds
        tokens_fit = sample.tokens >= sample.requests >= max(sample.sampled, 1) and sample.sampled >= 0
        tokens_fit &= sample.drafted or sample.tokens == sample.requests
        if not (times and draft_fits and tokens_fit and 0 <= sample.context <= MOST_CONTEXT):
            raise DataError(
                f"impossible cost sample {tuple(sample)}",
                expected="1 <= requests <= tokens (equal when nothing was drafted), 0 <= sampled <= requests, "
                "context >= 0, possible times, 0 <= draft_seconds < seconds, draft_seconds > 0 exactly when drafted",
                fix="Measure the engine again.",
            )


class _Part(NamedTuple):
    """Columns of one curve: its level, and a ramp from 0 to 1 over each segment."""

    knots_K: np.ndarray
    columns_NC: np.ndarray
    has_level: bool

    @classmethod
    def over(cls, x_N: np.ndarray, used_N: np.ndarray) -> _Part:
        knots_K = np.unique(x_N[used_N])
        knots_K = knots_K[np.linspace(0, len(knots_K) - 1, min(len(knots_K), MAX_KNOTS)).round().astype(int)]
        ramps = [np.clip((x_N - low) / (high - low), 0, 1) for low, high in pairwise(knots_K)]
        return cls(knots_K, np.stack([np.ones_like(x_N), *ramps], axis=1) * used_N[:, None], True)

    def without_level(self) -> _Part:
        return self._replace(columns_NC=self.columns_NC[:, 1:], has_level=False)

    def smoothness_rows(self) -> np.ndarray:
        """Rows of the differences between neighbouring slopes, each scaled to its span of knots."""
        width = np.diff(self.knots_K)
        rows = np.zeros((max(len(width) - 1, 0), self.columns_NC.shape[1]))
        for row, (low, high) in enumerate(pairwise(width)):
            rows[row, row + self.has_level] = (low + high) / (2 * low)
            rows[row, row + 1 + self.has_level] = -(low + high) / (2 * high)
        return rows

    def curve(self, values_C: np.ndarray) -> Curve:
        return Curve(self.knots_K.tolist(), np.cumsum(values_C if self.has_level else [0.0, *values_C]).tolist())


class _Solution(NamedTuple):
    parts: list[tuple[_Part, np.ndarray]]
    context_slope: float


def _solve(parts: list[_Part], context_N: np.ndarray, seconds_N: np.ndarray) -> tuple[_Solution, np.ndarray]:
    """Increments and context slope, and the fitted seconds [N]; outliers lose their weight over the reweightings."""
    typical = float(np.median(seconds_N))
    context_unit = max(float(context_N.max()), 1.0)
    data_NC = np.concatenate([*(part.columns_NC for part in parts), context_N[:, None] / context_unit], axis=1)
    starts = np.cumsum([0] + [part.columns_NC.shape[1] for part in parts])
    penalties = []
    for start, part in zip(starts, parts, strict=False):
        rows = part.smoothness_rows()
        penalties.append(np.zeros((len(rows), data_NC.shape[1])))
        penalties[-1][:, start : start + rows.shape[1]] = SMOOTHNESS * rows
        if not part.has_level:
            penalties.append(HOST_RIDGE * np.eye(data_NC.shape[1])[start : start + part.columns_NC.shape[1]])
    penalties.append(CONTEXT_RIDGE * np.eye(data_NC.shape[1])[-1:])
    penalty_PC = np.concatenate(penalties) / typical
    least_C = np.zeros(data_NC.shape[1])
    for start, part in zip(starts, parts, strict=False):
        least_C[start : start + part.has_level] = LEAST_LEVEL * seconds_N.min()
    weight_N = np.ones_like(seconds_N)
    for _ in range(REWEIGHTINGS):
        rows = np.concatenate([data_NC * (weight_N / seconds_N)[:, None], penalty_PC])
        wanted = np.concatenate([weight_N, np.zeros(len(penalty_PC))])
        values_C = least_C + _nonnegative_least_squares(rows, wanted - rows @ least_C)
        fitted_N = data_NC @ values_C
        relative_N = (seconds_N - fitted_N) / seconds_N
        spread = max(1.4826 * float(np.median(np.abs(relative_N))), MIN_SPREAD)
        weight_N = 1 / np.sqrt(1 + (relative_N / (2 * spread)) ** 2)  # Cauchy
    pieces = np.split(values_C, starts[1:])
    return _Solution(list(zip(parts, pieces, strict=False)), float(values_C[-1]) / context_unit), fitted_N


def _nonnegative_least_squares(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """x >= 0 with the least |rows @ x - wanted| (Lawson and Hanson, 1974, chapter 23)."""
    columns = rows.shape[1]
    scale = np.maximum(np.linalg.norm(rows, axis=0), 1e-300)
    rows = rows / scale
    x, free = np.zeros(columns), np.zeros(columns, dtype=bool)
    for _ in range(3 * columns):
        gradient = np.where(free, -np.inf, rows.T @ (wanted - rows @ x))
        if gradient.max() <= 1e-9:
            break
        free[gradient.argmax()] = True
        while True:
            candidate = np.zeros(columns)
            candidate[free] = np.linalg.lstsq(rows[:, free], wanted, rcond=None)[0]
            blocked = free & (candidate <= 0)
            if not blocked.any():
                x = candidate
                break
            share = (x[blocked] / np.maximum(x[blocked] - candidate[blocked], 1e-300)).min()
            x = x + share * (candidate - x)
            free &= x > 1e-15
            x[~free] = 0.0
    return x / scale
