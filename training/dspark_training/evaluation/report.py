"""What a person reads of an evaluation: tables and a plot, made from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dspark_serving.bench.report import distinct
from dspark_serving.bench.results import Row

Table = tuple[list[str], list[list[str]]]
"""Header and lines."""


def length_table(rows: Sequence[Row]) -> Table:
    """One line a subject, dataset and temperature."""
    header = ["dataset", "temperature", "arm", "requests", "accepted length (95 %)", "tokens/s", "kept by position"]
    lines = [
        [
            row["dataset"],
            f"{row['temperature']:g}",
            row["arm"],
            str(row["requests"]),
            _bounded(row["accepted_length"], row["accepted_length_low"], row["accepted_length_high"]),
            _number(row["tokens_per_second"], 1),
            " ".join(_number(share, 2) for share in row.get("conditional_acceptance", [])) or "-",
        ]
        for row in rows
        if "accepted_length" in row
    ]
    return header, lines


def difference_table(rows: Sequence[Row]) -> Table:
    """One line a pair, dataset and temperature."""
    header = ["dataset", "temperature", "arm", "minus", "difference of accepted length (95 %)"]
    lines = [
        [
            row["dataset"],
            f"{row['temperature']:g}",
            row["arm"],
            row["compared_with"],
            _bounded(row["difference"], row["low"], row["high"], sign="+"),
        ]
        for row in rows
        if "difference" in row
    ]
    return header, lines


def quality_table(rows: Sequence[Row]) -> Table:
    """One line a subject, dataset, temperature and position."""
    header = ["dataset", "temperature", "arm", "confidence", "position", "labels", "ECE", "Brier", "AUROC"]
    lines = [
        [
            row["dataset"],
            f"{row['temperature']:g}",
            row["arm"],
            row["confidence"],
            str(row["position"]),
            str(row["labels"]),
            *(_number(row[key], 3) for key in ("ece", "brier", "auroc")),
        ]
        for row in rows
        if "position" in row
    ]
    return header, lines


def markdown(title: str, rows: Sequence[Row], notes: str) -> str:
    """All tables that have lines."""
    titles = {
        "Accepted length": length_table(rows),
        "Differences on the same questions": difference_table(rows),
        "Confidence: survival up to each position": quality_table(rows),
    }
    parts = [f"# {title}", notes]
    for name, (header, lines) in titles.items():
        if lines:
            cells = [header, ["---"] * len(header), *lines]
            parts.append(f"## {name}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in cells))
    return "\n\n".join(parts) + "\n"


def plot_lengths(rows: Sequence[Row], path: Path) -> None:
    """Accepted lengths with their intervals, a panel a temperature; a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.get("accepted_length") is not None]
    datasets, temperatures, arms = (distinct(shown, key) for key in ("dataset", "temperature", "arm"))
    if not shown:
        return
    figure = Figure(figsize=(1.5 + 1.6 * len(datasets) * len(temperatures), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
    for panel, temperature in zip(panels, temperatures, strict=True):
        for place, arm in enumerate(arms):
            here = [row for row in shown if row["arm"] == arm and row["temperature"] == temperature]
            shift = (place - (len(arms) - 1) / 2) * 0.8 / len(arms)
            values = [row["accepted_length"] for row in here]
            bounds = [[row["accepted_length"] - row["accepted_length_low"] for row in here]]
            bounds += [[row["accepted_length_high"] - row["accepted_length"] for row in here]]
            at = [datasets.index(row["dataset"]) + shift for row in here]
            panel.errorbar(at, values, yerr=bounds, fmt="o", markersize=4, capsize=3, label=arm, color=f"C{place}")
        panel.set_xticks(range(len(datasets)), datasets, rotation=20)
        panel.set(title=f"temperature {temperature:g}", ylim=(0.9, None))
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("accepted length, bonus token included")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _bounded(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    if value is None or low is None or high is None:
        return "-"
    return f"{value:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
