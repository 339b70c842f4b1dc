"""How much faster one arm is than another, and how sure that is.

Both arms sent the same prompts in the same repetitions, so both are resampled together: repetitions and prompts are
drawn with replacement, each by itself (the pigeonhole bootstrap, Owen 2007). That covers the machine's noise between
repetitions and the choice of prompts; with one repetition, the prompts only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dspark_serving.bench.runs import Run
from dspark_serving.errors import DataError

_RESAMPLES = 2000


class Ratio(NamedTuple):
    """A ratio with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


class Requests(NamedTuple):
    """What each request took, by repetition and prompt."""

    tokens_RP: np.ndarray
    seconds_RP: np.ndarray  # the request's latency
    share_RP: np.ndarray  # its part of the run's time: the parts of a run add up to the run's seconds

    def drawn(self, repetitions: np.ndarray, prompts: np.ndarray) -> Requests:
        """The same with these repetitions [..., R] and prompts [..., P] instead."""
        pairs = (repetitions[..., :, None], prompts[..., None, :])
        return Requests(*(table[pairs] for table in self))


def requests_of(runs: Sequence[Run], *, equal_pace: bool = False) -> Requests:
    """Tables of runs of one arm at one point, in the order given; with `equal_pace`, a run's times are by its pace.

    The time in which several requests are under way belongs to all of them: each gets a part in proportion to its
    latency.
    """
    pace_R = np.array([_pace(run) if equal_pace else 1.0 for run in runs])
    seconds_RP = np.array([[sample.latency for sample in run.samples] for run in runs]) / pace_R[:, None]
    run_seconds_R = np.array([run.seconds for run in runs]) / pace_R
    return Requests(
        tokens_RP=np.array([[float(sample.output_tokens) for sample in run.samples] for run in runs]),
        seconds_RP=seconds_RP,
        share_RP=seconds_RP * (run_seconds_R / seconds_RP.sum(axis=1))[:, None],
    )


def throughput(requests: Requests) -> np.ndarray:
    """Tokens a second of all users together."""
    return np.asarray(requests.tokens_RP.sum(axis=(-2, -1)) / requests.share_RP.sum(axis=(-2, -1)))


def user_speed(requests: Requests) -> np.ndarray:
    """Tokens a second of the median request, prefill included."""
    return np.asarray(np.median(requests.tokens_RP / requests.seconds_RP, axis=(-2, -1)))


def speed(runs: Sequence[Run], *, equal_pace: bool = False) -> float:
    """What arms are judged by, of the runs of one point together: see `speed_ratio`."""
    return float(_statistic(runs)(requests_of(runs, equal_pace=equal_pace)))


def speed_ratio(runs: Sequence[Run], others: Sequence[Run], *, equal_pace: bool = False) -> Ratio:
    """The speed of `runs` by that of `others`, which are of the same point and the same repetitions in the same order.

    Speed is throughput where the number of requests under way is fixed. Where their rate is, the rate fixes throughput
    too, and the users' speed tells arms apart. With `equal_pace`, all runs' times are by the pace of the machine.
    """
    statistic = _statistic(runs)
    ours, theirs = (requests_of(each, equal_pace=equal_pace) for each in (runs, others))
    repetitions, prompts = ours.tokens_RP.shape
    rng = np.random.default_rng(0)
    drawn_SR = rng.integers(repetitions, size=(_RESAMPLES, repetitions))
    drawn_SP = rng.integers(prompts, size=(_RESAMPLES, prompts))
    ratios_S = statistic(ours.drawn(drawn_SR, drawn_SP)) / statistic(theirs.drawn(drawn_SR, drawn_SP))
    low, high = np.quantile(ratios_S, [0.025, 0.975])
    return Ratio(float(statistic(ours) / statistic(theirs)), float(low), float(high))


def _pace(run: Run) -> float:
    if run.pace_seconds is None:
        raise DataError(f"{run.key} has no pace", expected="one for every run", fix="Measure with --pace.")
    return run.pace_seconds


def _statistic(runs: Sequence[Run]) -> Callable[[Requests], np.ndarray]:
    return throughput if runs[0].key.point.load.concurrency is not None else user_speed
