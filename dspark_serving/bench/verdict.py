"""What a sweep says about one arm, in plain words, the points where it loses included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dspark_serving.bench.plan import Point
from dspark_serving.bench.results import Row
from dspark_serving.bench.runs import Run
from dspark_serving.bench.statistics import Ratio, speed, speed_ratio

FLOOR = 0.97
"""A point below this share of the best other arm counts as lost."""


class Comparison(NamedTuple):
    """The candidate against every rival at one point."""

    point: Point
    candidate: str
    ratios: dict[str, Ratio]  # by rival
    fair: Ratio | None  # to the rival that the other repetitions show fastest, each repetition by itself

    @property
    def best_other(self) -> str:
        """The fastest rival: the one to which the ratio is lowest."""
        return min(self.ratios, key=lambda rival: self.ratios[rival].value)

    @property
    def ratio(self) -> Ratio:
        """To the fastest rival, picked for being fastest in these very runs, which tells against the candidate: the
        best of several equal arms is the luckiest one. `fair` is free of that.
        """
        return self.ratios[self.best_other]

    def row(self, ending: str = "") -> Row:
        """Keys of the candidate's summary row, with an ending."""
        values = {
            "best_other": self.best_other,
            "ratio_to_best_other": self.ratio.value,
            "best_other_low": self.ratio.low,
            "best_other_high": self.ratio.high,
            "ratio_to_best_by_other_repetitions": None if self.fair is None else self.fair.value,
        }
        return {name + ending: value for name, value in values.items()}


def compare(
    candidate: str,
    rivals: Sequence[str],
    groups: Mapping[Point, Mapping[str, Sequence[Run]]],
    *,
    equal_pace: bool = False,
) -> list[Comparison]:
    """The candidate at every point where it and a rival have run the same repetitions; see `speed_ratio`."""
    comparisons = []
    for point, arms in groups.items():
        ratios = {}
        for rival in rivals:
            ours, theirs = paired(arms.get(candidate, []), arms.get(rival, []))
            if ours:
                ratios[rival] = speed_ratio(ours, theirs, equal_pace=equal_pace)
        if ratios:
            fair = _fair(arms[candidate], [arms[rival] for rival in ratios], equal_pace)
            comparisons.append(Comparison(point, candidate, ratios, fair))
    return comparisons


def _fair(runs: Sequence[Run], rivals: Sequence[Sequence[Run]], equal_pace: bool) -> Ratio | None:
    """`runs`, each against the rival that is fastest in the other repetitions; None where there are no others."""
    common = set.intersection(*({run.key.repetition for run in each} for each in (runs, *rivals)))
    if len(common) < 2:
        return None
    ours = [run for run in runs if run.key.repetition in common]
    theirs = []
    for run in ours:
        others = common - {run.key.repetition}
        fastest = max(rivals, key=lambda rival: _speed_in(rival, others, equal_pace))
        theirs += [rival_run for rival_run in fastest if rival_run.key.repetition == run.key.repetition]
    return speed_ratio(ours, theirs, equal_pace=equal_pace)


def _speed_in(runs: Sequence[Run], repetitions: set[int], equal_pace: bool) -> float:
    return speed([run for run in runs if run.key.repetition in repetitions], equal_pace=equal_pace)


def paired(runs: Sequence[Run], others: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs of the repetitions that both have, in the same order."""
    by_repetition = {run.key.repetition: run for run in others}
    pairs = [(run, by_repetition[run.key.repetition]) for run in runs if run.key.repetition in by_repetition]
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def verdict(comparisons: Sequence[Comparison]) -> str:
    """Markdown: the range over all points, each lost point, and each rival by itself."""
    if not comparisons:
        return "No point has runs of the candidate and of a rival: nothing to compare."
    rivals = list(dict.fromkeys(rival for comparison in comparisons for rival in comparison.ratios))
    ratios = [comparison.ratio.value for comparison in comparisons]
    lost = [comparison for comparison in comparisons if comparison.ratio.value < FLOOR]
    surely = sum(comparison.ratio.high < FLOOR for comparison in lost)
    count = f"Below {FLOOR} at {len(lost)} of {len(ratios)} points ({surely} with the whole 95 % interval):"
    lines = [
        f"**{comparisons[0].candidate} against the best of {', '.join(rivals)}: {_range(ratios)}** "
        f"(median {np.median(ratios):.2f}, {len(ratios)} points). " + (count if lost else f"Nowhere below {FLOOR}."),
        *_listed(lost),
    ]
    fair = [(c, c.fair) for c in comparisons if c.fair is not None]
    if fair:
        values = [ratio.value for _, ratio in fair]
        lost_fairly = [f"{c.point} {ratio.value:.2f}" for c, ratio in fair if ratio.value < FLOOR]
        lines.append(
            f"Each repetition against the arm that is best in the others (without the luck of being picked for these "
            f"runs): {_range(values)}, median {np.median(values):.2f}; below {FLOOR} at {len(lost_fairly)} of "
            f"{len(fair)} points{': ' if lost_fairly else ''}{', '.join(lost_fairly)}."
        )
    behind = [c for c in comparisons if c.ratio.high < 1 and c not in lost]
    if behind:
        lines += [f"At {FLOOR} or more, but surely behind (95 % interval below 1):", *_listed(behind)]
    lines += ["By rival:", *(_against(rival, comparisons) for rival in rivals)]
    return "\n".join(lines)


def _listed(comparisons: Sequence[Comparison]) -> list[str]:
    ordered = sorted(comparisons, key=lambda comparison: comparison.ratio.value)
    return [
        f"- {c.point}: {c.ratio.value:.2f} ({c.ratio.low:.2f}-{c.ratio.high:.2f}) against {c.best_other}"
        for c in ordered
    ]


def _against(rival: str, comparisons: Sequence[Comparison]) -> str:
    here = [comparison for comparison in comparisons if rival in comparison.ratios]
    top = max(_pressure(comparison.point) for comparison in here)
    highest = [c for c in here if _pressure(c.point) == top]
    values = [c.ratios[rival].value for c in here]
    mean = np.exp(np.mean(np.log(values)))
    under_load = _range([c.ratios[rival].value for c in highest])
    everywhere = f"{_range(values)} over {len(here)} points (geometric mean {mean:.2f})"
    return f"- {rival}: {everywhere}; at {highest[0].point.load}: {under_load}"


def _pressure(point: Point) -> float:
    return point.load.concurrency or point.load.request_rate or 0.0


def _range(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f}-{max(ratios):.2f}"
