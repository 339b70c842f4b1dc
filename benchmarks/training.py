"""Figures of a training run as a result file: `python -m benchmarks.training [--bundles DIRECTORY]`.

The runs themselves measured them (`dspark train` leaves them in a bundle's training.json); this is the common form.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dspark_serving.bench.results import ResultFile, Row
from dspark_serving.cli.console import one_line_errors, report

_BUNDLES = Path(__file__).resolve().parents[1] / "examples" / "bundles"
_RESULT = Path(__file__).parent / "results" / "training.json"
_HELD_OUT = "held-out training prompts"


def rows_of(provenance: dict[str, Any]) -> list[Row]:
    """The finished drafter on every evaluation set, then the held-out accepted length along its runs.

    Tokens and hours count from the first run behind its weights; `run` is the number of the run, the last one its own.
    """
    facts = provenance["facts"]
    last = {"algorithm": provenance["recipe"]["algorithm"], "history": provenance["history"]}
    tokens, hours = 0, 0.0
    curve: list[Row] = []
    runs = [*provenance["earlier"], last | {name: facts[name] for name in ("tokens", "hours")}]
    for number, run in enumerate(runs, start=1):
        curve += [
            {
                "family": last["algorithm"],
                "run": number,
                "run_family": run["algorithm"],
                "tokens": tokens + point["tokens"],
                "hours": hours + point["seconds"] / 3600,
                "dataset": _HELD_OUT,
                "temperature": 0.0,
                "accepted_length": point["accepted_length"],
                "conditional_acceptance": point["conditional_acceptance"],
            }
            for point in run["history"]
        ]
        tokens, hours = tokens + run["tokens"], hours + run["hours"]
    spent = {"family": last["algorithm"], "run": len(runs), "tokens": tokens, "hours": hours}
    return [{**spent, **row} for row in facts["evaluation"]] + curve


def markdown(rows: list[Row], notes: str) -> str:
    """One line a row."""
    lines = [
        "| family | run | dataset | target tokens run | hours | accepted length | prompt lookup |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lookup = f"{row['prompt_lookup']:.2f}" if "prompt_lookup" in row else "-"
        lines.append(
            f"| {row['family']} | {row['run']} | {row['dataset']} | {row['tokens']:,} | {row['hours']:.2f} | "
            f"{row['accepted_length']:.2f} | {lookup} |"
        )
    return f"# Training\n\n{notes}\n\n" + "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Held-out accepted length along the runs, against tokens and against hours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curve = [row for row in rows if row["dataset"] == _HELD_OUT]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    columns = {"tokens": "target tokens", "hours": "hours of training"}
    for axes, (column, label) in zip(figure.subplots(1, 2, sharey=True), columns.items(), strict=True):
        for family in dict.fromkeys(row["family"] for row in curve):
            points = [(row[column], row["accepted_length"]) for row in curve if row["family"] == family]
            axes.plot(*zip(*points, strict=True), marker=".", markersize=4, label=family)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accepted length, held-out answers")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def main(
    bundles: Annotated[Path, typer.Option(help="Directory of trained drafters.")] = _BUNDLES,
    output: Annotated[Path, typer.Option(help="JSON file; a table and a plot are written beside it.")] = _RESULT,
) -> None:
    """Write what a training run measured in the form of the other results."""
    with one_line_errors():
        rows: list[Row] = []
        starts = []
        for source in sorted(bundles.glob("*/training.json")):
            provenance = json.loads(source.read_text())
            rows += rows_of(provenance)
            runs = [f"{run['steps']} steps of {run['algorithm']}" for run in provenance["earlier"]]
            before = f"after {' and '.join(runs)}" if runs else "new weights"
            starts.append(f"{source.parent.name}: {before}, {provenance['facts']['steps']} steps.")
        notes = " ".join(
            [
                "Accepted length includes the bonus token; temperature 0. Tokens and hours count from the first run "
                "behind a drafter's weights; runs on other answers were judged on other held-out ones.",
                *starts,
            ]
        )
        ResultFile("training", output).write(rows, notes)
        output.with_suffix(".md").write_text(markdown(rows, notes))
        plot(rows, output.with_suffix(".png"))
        report(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
