"""`dspark calibrate`: temperatures of the drafter's confidences, of its head or estimated, from recorded rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dspark_serving.cli.console import console, one_line_errors
from dspark_serving.recording import read_recording
from dspark_serving.recording.labels import labels_of, plot_reliability
from dspark_serving.scheduler.calibration import FILE_NAME, Calibration
from dspark_serving.scheduler.calibration_fit import Labels, fit_temperatures, survival_quality


def calibrate(
    recordings: Annotated[list[Path], typer.Argument(help="Recordings of the drafter's rounds (.npz).")],
    output: Annotated[
        Path, typer.Option(help="Where to write; beside the drafter's weights it is found by itself.")
    ] = Path(FILE_NAME),
    plot: Annotated[Path | None, typer.Option(help="Reliability diagram to draw (.png or .svg).")] = None,
) -> None:
    """Fit a temperature for each position of the block to what became of verified drafts."""
    with one_line_errors():
        labels = labels_of([read_recording(path) for path in recordings])
        fitted = fit_temperatures(labels)
        fitted = replace(fitted, fitted_on={**fitted.fitted_on, "recordings": len(recordings)})
        fitted.save(output)
        if plot is not None:
            plot_reliability(plot, labels, fitted)
    console.print(_table(labels, fitted))
    console.print(f"calibration: {output}" + (f", diagram: {plot}" if plot else ""), soft_wrap=True)


def _table(labels: Labels, fitted: Calibration) -> Table:
    table = Table(title="survival up to each position, before -> after (on the rounds it was fitted to)")
    for column in ("position", "labels", "temperature", "ECE", "Brier", "AUROC"):
        table.add_column(column, justify="right")
    before = survival_quality(labels, Calibration.identity(labels.gamma))
    after = survival_quality(labels, fitted)
    for position, (old, new, temperature) in enumerate(zip(before, after, fitted.temperatures_G, strict=True), start=1):
        scores = (f"{was:.4f} -> {now:.4f}" for was, now in zip(old[1:], new[1:], strict=True))
        table.add_row(str(position), str(new.labels), f"{temperature:.3f}", *scores)
    return table
