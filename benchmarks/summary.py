"""From samples to rows: the figures of one run, and those of an arm over its repetitions with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from benchmarks.load import Sample
from benchmarks.results import Row

_RESAMPLES = 2000


@dataclass(frozen=True)
class Context:
    """What all rows of an arm have in common."""

    target: str
    drafter: str | None
    family: str | None  # dspark, ngram, ...; None where nothing speculates
    temperature: float


@dataclass(frozen=True)
class Run:
    """All prompts of a dataset, sent once to one arm."""

    arm: str
    dataset: str
    concurrency: int
    repetition: int
    samples: tuple[Sample, ...]

    @property
    def seconds(self) -> float:
        """From the first request to the last answer."""
        return max(s.end for s in self.samples) - min(s.start for s in self.samples)


class Ratio(NamedTuple):
    """A ratio of throughputs with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def run_row(context: Context, run: Run, off: Run) -> Row:
    """The row of one run; `off` is the run without speculation that its texts are compared with."""
    return _row(context, [run], [off], run.repetition)


def summary_row(context: Context, runs: Sequence[Run], off: Sequence[Run]) -> Row:
    """The row of an arm over all its repetitions, with its throughput as a ratio to `off`, repetition by repetition."""
    row = _row(context, runs, off, None)
    if runs[0].arm == off[0].arm:
        return row
    ratio = ratio_of_throughputs(runs, off)
    return row | {"ratio_to_off": ratio.value, "low": ratio.low, "high": ratio.high}


def _row(context: Context, runs: Sequence[Run], off: Sequence[Run], repetition: int | None) -> Row:
    samples = [sample for run in runs for sample in run.samples]
    tokens, seconds = sum(s.output_tokens for s in samples), sum(run.seconds for run in runs)
    return {
        "arm": runs[0].arm,
        **asdict(context),
        "dataset": runs[0].dataset,
        "concurrency": runs[0].concurrency,
        "repetition": repetition,
        "requests": len(samples),
        "output_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_user": float(np.median([s.output_tokens / (s.end - s.start) for s in samples])),
        "accepted_length": accepted_length(samples),
        "verified_tokens_per_round": verified_tokens_per_round(samples),
        "ttft_p50": float(np.median([_first(s) - s.start for s in samples])),
        "tpot_p50": float(np.median([(s.end - _first(s)) / max(s.output_tokens - 1, 1) for s in samples])),
        "itl_p95": _gap_p95(samples),
        "equal_to_off": _share_of_equal_texts(runs, off),
    }


def accepted_length(samples: Sequence[Sample]) -> float | None:
    """Tokens a request and round, bonus token included; a request's first token is the prefill's and no round's.

    None where nothing speculates, or no answer was long enough for a round.
    """
    rounds = sum(s.rounds or 0 for s in samples)
    return sum(s.output_tokens - 1 for s in samples) / rounds if rounds else None


def verified_tokens_per_round(samples: Sequence[Sample]) -> float | None:
    """Tokens a request and round that the target's verification ran over, the anchor included."""
    rounds = sum(s.rounds or 0 for s in samples)
    return sum(s.verified_tokens or 0.0 for s in samples) / rounds if rounds else None


def ratio_of_throughputs(runs: Sequence[Run], off: Sequence[Run]) -> Ratio:
    """Tokens a second of `runs` by those of `off`; a bootstrap over prompts gives the interval.

    Both arms are drawn with the same prompts, each with its tokens and its share of the run's time over all
    repetitions. So the interval covers the choice of prompts, and the machine's noise as far as it hits some prompts
    more than others.
    """
    arm_P2, off_P2 = _tokens_and_seconds(runs), _tokens_and_seconds(off)
    prompts = len(off_P2)
    drawn_SP = np.random.default_rng(0).integers(prompts, size=(_RESAMPLES, prompts))
    ratios_S = _throughput(arm_P2[drawn_SP]) / _throughput(off_P2[drawn_SP])
    low, high = np.quantile(ratios_S, [0.025, 0.975])
    return Ratio(float(_throughput(arm_P2) / _throughput(off_P2)), float(low), float(high))


def time_shares(samples: Sequence[Sample]) -> list[float]:
    """Seconds of each request when every moment is divided equally among the requests under way.

    They add up to the time in which any request was under way, so that tokens by shares of any subset is a throughput.
    """
    shares = [0.0] * len(samples)
    moments = sorted({moment for s in samples for moment in (s.start, s.end)})
    for begin, end in pairwise(moments):
        active = [i for i, s in enumerate(samples) if s.start <= begin and s.end >= end]
        for i in active:
            shares[i] += (end - begin) / len(active)
    return shares


def _tokens_and_seconds(runs: Sequence[Run]) -> np.ndarray:
    """[P, 2]: tokens and seconds of each prompt over all runs."""
    table_P2 = np.zeros((len(runs[0].samples), 2))
    for run in runs:
        for sample, share in zip(run.samples, time_shares(run.samples), strict=True):
            table_P2[sample.prompt] += (sample.output_tokens, share)
    return table_P2


def _throughput(table: np.ndarray) -> np.ndarray:
    total = table.sum(axis=-2)
    return np.asarray(total[..., 0] / total[..., 1])


def _first(sample: Sample) -> float:
    return sample.arrivals[0] if sample.arrivals else sample.end


def _gap_p95(samples: Sequence[Sample]) -> float | None:
    """Of the waits between the pieces of text that a user sees appear, one or more tokens each."""
    gaps = [after - before for s in samples for before, after in pairwise(s.arrivals)]
    return float(np.quantile(gaps, 0.95)) if gaps else None


def _share_of_equal_texts(runs: Sequence[Run], off: Sequence[Run]) -> float:
    equal = [
        ours.text == theirs.text
        for run, reference in zip(runs, off, strict=True)
        for ours, theirs in zip(run.samples, reference.samples, strict=True)
    ]
    return sum(equal) / len(equal)
