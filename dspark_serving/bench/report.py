"""What a person reads of a sweep: a Markdown table and a plot, made from its rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspark_serving.bench.results import Row
from dspark_serving.bench.workload import Load

_COLUMNS: dict[str, Callable[[Row], str]] = {
    "dataset": lambda row: row["dataset"],
    "temperature": lambda row: f"{row['temperature']:g}",
    "load": lambda row: str(_load(row)),
    "arm": lambda row: row["arm"],
    "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
    "tokens/s a user": lambda row: f"{row['tokens_per_second_per_user']:.1f}",
    "times baseline (95 %)": lambda row: _ratio(row, "ratio_to_off", "low", "high"),
    "times best other (95 %)": lambda row: _ratio(row, "ratio_to_best_other", "best_other_low", "best_other_high"),
    "accepted length": lambda row: _or_dash(row["accepted_length"], "{:.2f}"),
    "verified a round": lambda row: _or_dash(row["verified_tokens_per_round"], "{:.2f}"),
    "pace, ms": lambda row: _or_dash(row["pace_seconds"], "{:.2f}", 1000),
    "times best other at equal pace (95 %)": lambda row: _ratio(
        row, *(f"{name}_at_equal_pace" for name in ("ratio_to_best_other", "best_other_low", "best_other_high"))
    ),
    "first token, s": lambda row: f"{row['ttft_p50']:.2f}",
    "time a token, ms": lambda row: f"{1000 * row['tpot_p50']:.0f}",
    "95 % of gaps under, ms": lambda row: _or_dash(row["itl_p95"], "{:.0f}", 1000),
    "goodput": lambda row: _or_dash(row["goodput"], "{:.0%}"),
    "same text as baseline": lambda row: _or_dash(row["equal_to_off"], "{:.0%}"),
}


def markdown(title: str, rows: list[Row], verdict: str | None, notes: str) -> str:
    """The verdict, the summary rows and the phases of a round as tables; columns that say nothing are left out."""
    summaries = summaries_of(rows)
    cells = {name: [show(row) for row in summaries] for name, show in _COLUMNS.items()}
    told = {name: column for name, column in cells.items() if set(column) != {"-"}}
    parts = [f"# {title}", *([verdict] if verdict else []), notes]
    parts.append(_table(list(told), [list(line) for line in zip(*told.values(), strict=True)]))
    phases = [row for row in rows if "phase" in row]
    if phases:
        parts += ["## Mean time of a round by phase, milliseconds", _phase_table(phases)]
    return "\n\n".join(parts) + "\n"


def plot_pareto(rows: list[Row], path: Path) -> None:
    """Tokens a second of all users against those of the median user, a panel a dataset and temperature; a PNG file.

    The points of an arm are its loads, joined in their order; further up and to the right is better.
    """
    import matplotlib

    matplotlib.use("Agg")  # files only, on machines without a display
    from matplotlib import pyplot

    summaries = summaries_of(rows)
    arms, datasets, temperatures = (distinct(summaries, key) for key in ("arm", "dataset", "temperature"))
    size = (4.2 * len(datasets), 3.6 * len(temperatures))
    figure, panels = pyplot.subplots(len(temperatures), len(datasets), figsize=size, squeeze=False)
    for line, temperature in zip(panels, temperatures, strict=True):
        for panel, dataset in zip(line, datasets, strict=True):
            here = [row for row in summaries if (row["dataset"], row["temperature"]) == (dataset, temperature)]
            for color, arm in enumerate(arms):
                _draw_arm(panel, [row for row in here if row["arm"] == arm], arm, f"C{color}")
            panel.set(title=f"{dataset}, temperature {temperature:g}", xlabel="tokens per second, median user")
            panel.set_ylabel("tokens per second, all users")
            panel.set(xlim=(0, None), ylim=(0, None))
            panel.grid(alpha=0.3)
    panels[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def summaries_of(rows: list[Row]) -> list[Row]:
    """The rows that sum up an arm's repetitions."""
    return [row for row in rows if "phase" not in row and row["repetition"] is None]


def distinct(rows: list[Row], key: str) -> list[Any]:
    """Values of `key` in the order of their first appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def _draw_arm(panel: Any, rows: list[Row], arm: str, color: str) -> None:
    users = [row["tokens_per_second_per_user"] for row in rows]
    everyone = [row["tokens_per_second"] for row in rows]
    panel.plot(users, everyone, "o-", label=arm, color=color, markersize=4)
    for row, x, y in zip(rows, users, everyone, strict=True):
        panel.annotate(str(_load(row)), (x, y), fontsize=6, color=color, xytext=(3, 3), textcoords="offset points")


def _phase_table(phases: list[Row]) -> str:
    names = distinct(phases, "phase")
    lines: dict[tuple[str, ...], dict[str, float]] = {}
    for row in phases:
        where = (row["dataset"], f"{row['temperature']:g}", str(_load(row)), row["arm"], str(row["rounds"]))
        lines.setdefault(where, {})[row["phase"]] = row["seconds"]
    cells = [[*where, *(_or_dash(found.get(name), "{:.1f}", 1000) for name in names)] for where, found in lines.items()]
    return _table(["dataset", "temperature", "load", "arm", "rounds", *names], cells)


def _table(header: list[str], cells: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _load(row: Row) -> Load:
    return Load(row["concurrency"], row["request_rate"])


def _ratio(row: Row, value: str, low: str, high: str) -> str:
    return f"{row[value]:.2f} ({row[low]:.2f}-{row[high]:.2f})" if value in row else "-"


def _or_dash(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else form.format(scale * value)
