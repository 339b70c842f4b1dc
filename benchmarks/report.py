"""What a person reads of a result file: a Markdown table and a plot, made from its rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, on machines without a display

from matplotlib import pyplot

from benchmarks.results import Row

_COLUMNS: dict[str, Callable[[Row], str]] = {
    "dataset": lambda row: row["dataset"],
    "concurrency": lambda row: str(row["concurrency"]),
    "arm": lambda row: row["arm"],
    "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
    "tokens/s a user": lambda row: f"{row['tokens_per_second_per_user']:.1f}",
    "times `off` (95 %)": lambda row: _ratio(row),
    "accepted length": lambda row: _or_dash(row["accepted_length"], "{:.2f}"),
    "verified a round": lambda row: _or_dash(row["verified_tokens_per_round"], "{:.2f}"),
    "first token, s": lambda row: f"{row['ttft_p50']:.2f}",
    "time a token, ms": lambda row: f"{1000 * row['tpot_p50']:.0f}",
    "same text as `off`": lambda row: f"{row['equal_to_off']:.0%}",
}


def markdown(title: str, rows: list[Row], notes: str) -> str:
    """Tables of the summary rows and of the phases of a round."""
    summaries = [row for row in rows if "phase" not in row and row["repetition"] is None]
    table = _table(list(_COLUMNS), [[show(row) for show in _COLUMNS.values()] for row in summaries])
    parts = [f"# {title}", notes, table]
    phases = [row for row in rows if "phase" in row]
    if phases:
        parts += ["## Mean time of a round by phase, milliseconds", _phase_table(phases)]
    return "\n\n".join(parts) + "\n"


def plot_throughput(rows: list[Row], path: Path) -> None:
    """Tokens a second by concurrency, one panel a dataset, one line an arm; writes a PNG file."""
    summaries = [row for row in rows if "phase" not in row and row["repetition"] is None]
    datasets, arms = _distinct(summaries, "dataset"), _distinct(summaries, "arm")
    figure, panels = pyplot.subplots(1, len(datasets), figsize=(4 * len(datasets), 3.5), sharey=True, squeeze=False)
    for panel, dataset in zip(panels[0], datasets, strict=True):
        for arm in arms:
            points = [row for row in summaries if (row["dataset"], row["arm"]) == (dataset, arm)]
            panel.plot(
                [row["concurrency"] for row in points], [row["tokens_per_second"] for row in points], "o-", label=arm
            )
        panel.set_xscale("log", base=2)
        concurrencies = _distinct(summaries, "concurrency")
        panel.set_xticks(concurrencies, [str(c) for c in concurrencies])
        panel.set(title=dataset, xlabel="concurrency")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("tokens per second, all users")
    panels[0][0].set_ylim(bottom=0)
    panels[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _phase_table(phases: list[Row]) -> str:
    names = _distinct(phases, "phase")
    points = dict.fromkeys((row["arm"], row["concurrency"]) for row in phases)
    seconds = {(row["arm"], row["concurrency"], row["phase"]): row["seconds"] for row in phases}
    cells = [
        [arm, str(concurrency), *(_or_dash(seconds.get((arm, concurrency, name)), "{:.1f}", 1000) for name in names)]
        for arm, concurrency in points
    ]
    return _table(["arm", "concurrency", *names], cells)


def _table(header: list[str], cells: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _distinct(rows: list[Row], key: str) -> list[Any]:
    """Values of `key` in the order of their first appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def _ratio(row: Row) -> str:
    return f"{row['ratio_to_off']:.2f} ({row['low']:.2f}-{row['high']:.2f})" if "ratio_to_off" in row else "-"


def _or_dash(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else form.format(scale * value)
