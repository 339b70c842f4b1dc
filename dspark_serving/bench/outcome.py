"""The result of a sweep, whole or cut short: JSON, a Markdown table, a plot and a verdict."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_serving.bench.plan import RunKey, Settings, all_runs
from dspark_serving.bench.report import markdown, plot_pareto
from dspark_serving.bench.results import ResultFile
from dspark_serving.bench.runs import Run
from dspark_serving.bench.summary import by_point, rows_of
from dspark_serving.bench.verdict import compare, verdict

_EQUAL_PACE = "**At equal pace of the machine** (times divided by the CPU time of fixed work beside each run):"


def write_outcome(settings: Settings, runs: Sequence[Run], file: ResultFile, notes: str = "") -> str | None:
    """Write what the runs say, beside each other: .json, .md and .png.

    Args:
        settings: of the sweep.
        runs: those made so far, one at least.
        file: the JSON file.
        notes: what is to be said beside what the settings say.

    Returns:
        The verdict; None without a candidate.
    """
    said = None
    comparisons, equal_pace = [], []
    if settings.candidate is not None:
        points = by_point(settings, runs)
        comparisons = compare(settings.candidate, settings.rivals, points)
        said = verdict(comparisons)
        if settings.pace:
            equal_pace = compare(settings.candidate, settings.rivals, points, equal_pace=True)
            said += f"\n\n{_EQUAL_PACE}\n\n{verdict(equal_pace)}"
    rows = rows_of(settings, runs, comparisons, equal_pace)
    described = " ".join(part for part in (describe(settings), notes, missing(settings, runs)) if part)
    file.write(rows, "\n".join(part for part in (described, said) if part))
    file.path.with_suffix(".md").write_text(markdown(file.name, rows, said, described))
    plot_pareto(rows, file.path.with_suffix(".png"))
    return said


def missing_runs(settings: Settings, runs: Sequence[Run]) -> list[RunKey]:
    """What is planned and not made."""
    made = {run.key for run in runs}
    return [key for key in all_runs(settings) if key not in made]


def missing(settings: Settings, runs: Sequence[Run]) -> str:
    """A sentence on what is missing; empty when nothing is."""
    keys = missing_runs(settings, runs)
    if not keys:
        return ""
    whole = {run.key.point for run in runs}
    never = list(dict.fromkeys(str(key.point) for key in keys if key.point not in whole))
    points = f" Points without any run: {', '.join(never)}." if never else ""
    return f"CUT SHORT: {len(keys)} of {len(all_runs(settings))} runs are missing.{points}"


def describe(settings: Settings) -> str:
    """What was measured and how, in sentences."""
    shape = settings.shape
    ending = (
        "none ends earlier (ignore_eos), so that all arms do equal work"
        if shape.ignore_eos
        else "an answer may end earlier, so arms may do unequal work where they sample"
    )
    sentences = [
        f"Target {settings.target}; client: sglang.benchmark.serving.",
        f"{settings.repetitions} repetitions, arms in turns, caches emptied before every run; at least {shape.prompts} "
        f"prompts a run and never fewer than {_times(shape.waves)}the concurrency, {shape.max_tokens} tokens an "
        f"answer in the mean (prompts of a file: from half to one and a half times that): {ending}.",
        "Intervals: 95 %, bootstrapped over repetitions and prompts, both arms with the same draws.",
    ]
    if settings.baseline is not None:
        sentences.append(f"Baseline of ratios and texts: {settings.baseline}.")
    if settings.ttft_seconds is not None or settings.tpot_seconds is not None:
        limits = {"first token": settings.ttft_seconds, "time a token": settings.tpot_seconds}
        named = [f"{name} {1000 * limit:g} ms" for name, limit in limits.items() if limit is not None]
        sentences.append(f"Goodput: share of requests within {' and '.join(named)}.")
    return " ".join(sentences)


def _times(waves: int) -> str:
    return "" if waves == 1 else f"{waves} times (as far as the prompts go) "
