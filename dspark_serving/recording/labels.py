"""Calibration from recordings: what became of verified drafts, and reliability diagrams of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dspark_serving.errors import DataError
from dspark_serving.recording.file import Recording
from dspark_serving.recording.rounds import NEVER
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.calibration_fit import Labels, calibrated_survival
from dspark_serving.scheduler.calibration_quality import reliability


def labels_of(recordings: Sequence[Recording]) -> Labels:
    """Every request of every drafting round.

    Raises:
        DataError: the recordings are of drafters with different block sizes, or nothing was drafted in them.
    """
    gammas = sorted({recording.header.gamma for recording in recordings})
    if len(gammas) > 1:
        raise DataError(
            f"recordings of block sizes {gammas}", expected="one drafter", fix="Calibrate each drafter from its own."
        )
    outcomes = [kept.outcome for recording in recordings for kept in recording.rounds if kept.observed != NEVER]
    drafted = [(o.confidence_RG, o) for o in outcomes if o.confidence_RG is not None]
    if not drafted:
        raise DataError(
            "no round of the recordings drafted",
            expected="recordings under policy full or adaptive",
            fix="Record again.",
        )
    return Labels(
        np.concatenate([confidence_RG for confidence_RG, _ in drafted]),
        np.concatenate([outcome.verify_lens_R for _, outcome in drafted]),
        np.concatenate([outcome.accepted_R for _, outcome in drafted]),
    )


def plot_reliability(path: Path, labels: Labels, calibration: Calibration | None) -> None:
    """A diagram for each position, before and (where there is one) after calibration; the ending sets the format.

    Raises:
        DataError: the ending is of no known format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = labels.usable()
    figure = Figure(figsize=(2.6 * labels.gamma, 3.0), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if path.suffix.removeprefix(".").lower() not in canvas.get_supported_filetypes():
        raise DataError(f"cannot draw {path.name}", expected="an ending like .png or .svg", fix="Rename it.")
    curves = {"before": calibrated_survival(labels, Calibration.identity(labels.gamma))}
    if calibration is not None:
        curves["after"] = calibrated_survival(labels, calibration)
    for position, axes in enumerate(np.atleast_1d(figure.subplots(1, labels.gamma, sharey=True)), start=1):
        rows = labels.verified(position)
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for name, survival_NG in curves.items():
            curve = reliability(survival_NG[rows, position - 1], labels.survived(position)[rows])
            axes.plot(curve.predicted_M, curve.observed_M, marker="o", markersize=3, label=name)
        axes.set(title=f"position {position}", xlabel="predicted survival", xlim=(0, 1), ylim=(0, 1))
        axes.set_aspect("equal")
    figure.axes[0].set_ylabel("share accepted")
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
