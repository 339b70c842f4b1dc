"""From runs to rows: the figures of each run, and those of an arm over its repetitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from dspark_serving.bench.arms import Arm
from dspark_serving.bench.client import Sample
from dspark_serving.bench.plan import Point, Settings
from dspark_serving.bench.results import Row
from dspark_serving.bench.runs import Run
from dspark_serving.bench.statistics import speed_ratio
from dspark_serving.bench.verdict import Comparison, paired

ByPoint = Mapping[Point, Mapping[str, Sequence[Run]]]
"""The runs of each arm at each point, in the order of their repetitions."""


def by_point(settings: Settings, runs: Sequence[Run]) -> ByPoint:
    """Runs sorted into points and arms; a point that no arm has run is left out."""
    order = {arm.name: place for place, arm in enumerate(settings.arms)}
    places = {point: place for place, point in enumerate(settings.points)}
    known = [run for run in runs if run.key.point in places and run.key.arm in order]
    known.sort(key=lambda run: (places[run.key.point], order[run.key.arm], run.key.repetition))
    return {
        point: {arm: list(group) for arm, group in groupby(at_point, key=lambda run: run.key.arm)}
        for point, at_point in groupby(known, key=lambda run: run.key.point)
    }


def rows_of(
    settings: Settings, runs: Sequence[Run], comparisons: Sequence[Comparison], equal_pace: Sequence[Comparison] = ()
) -> list[Row]:
    """A row a run, then a summary row for each point and arm, then the phases of a round.

    Args:
        settings: of the sweep.
        runs: those made so far.
        comparisons: of the candidate.
        equal_pace: the same at equal pace of the machine.
    """
    arms = {arm.name: arm for arm in settings.arms}
    compared = {comparison.point: comparison for comparison in comparisons}
    at_equal_pace = {comparison.point: comparison for comparison in equal_pace}
    singles: list[Row] = []
    summaries: list[Row] = []
    phases: list[Row] = []
    for point, groups in by_point(settings, runs).items():
        baseline = groups.get(settings.baseline or "", [])
        for name, group in groups.items():
            singles += [_row(settings, arms[name], [run], baseline, run.key.repetition) for run in group]
            summary = _row(settings, arms[name], group, baseline, None) | _ratio_to_baseline(group, baseline)
            if name == settings.candidate and point in compared:
                summary |= compared[point].row()
                if point in at_equal_pace:
                    summary |= at_equal_pace[point].row("_at_equal_pace")
            summaries.append(summary)
            phases += _phase_rows(point, name, group)
    return singles + summaries + phases


def _row(settings: Settings, arm: Arm, runs: Sequence[Run], baseline: Sequence[Run], repetition: int | None) -> Row:
    point = runs[0].key.point
    samples = [sample for run in runs for sample in run.samples]
    tokens, seconds = sum(run.output_tokens for run in runs), sum(run.seconds for run in runs)
    return {
        "arm": arm.name,
        "target": settings.target,
        "drafter": arm.drafter,
        "family": arm.family,
        "dataset": point.dataset,
        "temperature": point.temperature,
        "concurrency": point.load.concurrency,
        "request_rate": point.load.request_rate,
        "repetition": repetition,
        "requests": len(samples),
        "output_tokens": tokens,
        "seconds": seconds,
        "pace_seconds": _mean_pace(runs),
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_user": float(np.median([s.output_tokens / s.latency for s in samples])),
        "accepted_length": accepted_length(runs),
        "verified_tokens_per_round": verified_tokens_per_round(runs),
        "ttft_p50": float(np.median([s.ttft for s in samples])),
        "tpot_p50": float(np.median([s.tpot for s in samples])),
        "itl_p95": _gap_p95(samples),
        "goodput": goodput(samples, settings.ttft_seconds, settings.tpot_seconds),
        "equal_to_off": equal_texts(runs, baseline) if point.temperature == 0 else None,
    }


def _mean_pace(runs: Sequence[Run]) -> float | None:
    paces = [run.pace_seconds for run in runs if run.pace_seconds is not None]
    return sum(paces) / len(paces) if paces else None


def accepted_length(runs: Sequence[Run]) -> float | None:
    """Tokens a request and round, bonus token included, by the server's count; None where nothing speculates."""
    counters = [run.counters for run in runs if run.counters is not None]
    rounds = sum(c.request_rounds for c in counters)
    return sum(c.tokens for c in counters) / rounds if rounds else None


def verified_tokens_per_round(runs: Sequence[Run]) -> float | None:
    """Tokens a request and round that the target's verification ran over, the anchor included."""
    counters = [run.counters for run in runs if run.counters is not None and run.counters.verified_tokens is not None]
    rounds = sum(c.request_rounds for c in counters)
    return sum(c.verified_tokens or 0.0 for c in counters) / rounds if rounds else None


def goodput(samples: Sequence[Sample], ttft_seconds: float | None, tpot_seconds: float | None) -> float | None:
    """Share of the requests that meet the given limits; None without limits."""
    if ttft_seconds is None and tpot_seconds is None:
        return None
    good = [
        (ttft_seconds is None or s.ttft <= ttft_seconds) and (tpot_seconds is None or s.tpot <= tpot_seconds)
        for s in samples
    ]
    return sum(good) / len(good)


def equal_texts(runs: Sequence[Run], baseline: Sequence[Run]) -> float | None:
    """Share of texts equal to the baseline's in the same repetition; None where it has no run."""
    equal = [
        ours.text == theirs.text
        for run, reference in zip(*paired(runs, baseline), strict=True)
        for ours, theirs in zip(run.samples, reference.samples, strict=True)
    ]
    return sum(equal) / len(equal) if equal else None


def _ratio_to_baseline(runs: Sequence[Run], baseline: Sequence[Run]) -> Row:
    ours, theirs = paired(runs, baseline)
    if not ours or runs[0].key.arm == baseline[0].key.arm:
        return {}
    ratio = speed_ratio(ours, theirs)
    return {"ratio_to_off": ratio.value, "low": ratio.low, "high": ratio.high}


def _phase_rows(point: Point, arm: str, runs: Sequence[Run]) -> list[Row]:
    """Mean seconds of each phase of a round, where the server counts them."""
    counters = [run.counters for run in runs if run.counters is not None]
    rounds = sum(c.rounds for c in counters)
    names = dict.fromkeys(phase for c in counters for phase in c.phase_seconds)
    where = {
        "arm": arm,
        "dataset": point.dataset,
        "temperature": point.temperature,
        "concurrency": point.load.concurrency,
        "request_rate": point.load.request_rate,
        "rounds": rounds,
    }
    return [
        where | {"phase": name, "seconds": sum(c.phase_seconds.get(name, 0.0) for c in counters) / rounds}
        for name in (names if rounds else ())
    ]


def _gap_p95(samples: Sequence[Sample]) -> float | None:
    """Of the waits between the pieces of text that a user sees appear, one or more tokens each."""
    gaps = [gap for sample in samples for gap in sample.gaps]
    return float(np.quantile(gaps, 0.95)) if gaps else None
