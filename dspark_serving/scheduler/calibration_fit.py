"""Sequential temperature scaling (DSpark paper) from recorded rounds, of which only verified positions have labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dspark_serving.errors import DataError
from dspark_serving.scheduler.calibration import HIGHEST, LOWEST, Calibration, logit, sigmoid
from dspark_serving.scheduler.calibration_quality import Quality, expected_calibration_error, quality

MIN_LABELS = 200  # below, the ECE is mostly noise and the position keeps temperature 1
_GRID = np.exp(np.linspace(np.log(LOWEST), np.log(HIGHEST), 81))  # 4 % apart, 1.0 in the middle
_REFINED = 16  # points between a grid point and each neighbour: 0.25 % apart


class Labels(NamedTuple):
    """One row for each request and drafting round."""

    confidence_NG: np.ndarray  # as the confidence head gave it, in [0, 1]
    verify_lens_N: np.ndarray  # anchor included
    accepted_N: np.ndarray  # accepted drafts, without the bonus token

    @property
    def gamma(self) -> int:
        """G."""
        return int(self.confidence_NG.shape[1])

    def usable(self) -> Labels:
        """Without rows that have a confidence that is no probability."""
        good_N = ((self.confidence_NG >= 0) & (self.confidence_NG <= 1)).all(axis=1)
        return Labels(self.confidence_NG[good_N], self.verify_lens_N[good_N], self.accepted_N[good_N])

    def verified(self, position: int) -> np.ndarray:
        """Rows [N] whose position (from 1) was verified: the only ones that tell whether the draft survived up to it.

        A row rejected earlier and not verified at `position` is known not to survive, but its like that would have
        survived is unknown: counting the ones and not the others would pull every probability down.
        """
        return self.verify_lens_N > position

    def survived(self, position: int) -> np.ndarray:
        """Labels [N] as float: the drafts up to `position` (from 1) were all accepted."""
        return (self.accepted_N >= position).astype(np.float64)


def fit_temperatures(labels: Labels) -> Calibration:
    """For k = 1..G in order: the T_k that minimises the ECE of prod_{i<=k} sigmoid(logit(c_i) / T_i), T_<k fixed.

    Sampled and greedy rows alike: a label is acceptance by the rule that was in force.

    Raises:
        DataError: fewer than MIN_LABELS labels even for the first position.
    """
    labels = labels.usable()
    if int(labels.verified(1).sum()) < MIN_LABELS:
        raise DataError(
            f"the recordings hold {int(labels.verified(1).sum())} verified drafts",
            expected=f"at least {MIN_LABELS}",
            fix="Record more rounds, under policy full if possible.",
        )
    logits_NG = logit(labels.confidence_NG)
    survival_N = np.ones(len(logits_NG))
    temperatures: list[float] = []
    for position in range(1, labels.gamma + 1):
        rows = labels.verified(position)
        logits_N = logits_NG[:, position - 1]
        found = _best(logits_N[rows], survival_N[rows], labels.survived(position)[rows])
        survival_N = survival_N * sigmoid(logits_N / np.float32(found))
        temperatures.append(found)
    counts = [int(labels.verified(position).sum()) for position in range(1, labels.gamma + 1)]
    return Calibration(tuple(temperatures), {"rows": len(logits_NG), "labels": counts})


def survival_quality(labels: Labels, calibration: Calibration) -> list[Quality]:
    """Scores of the survival up to each position, over the rows in which that position was verified."""
    labels = labels.usable()
    survival_NG = calibrated_survival(labels, calibration)
    rows = [labels.verified(position) for position in range(1, labels.gamma + 1)]
    return [quality(survival_NG[row, k], labels.survived(k + 1)[row]) for k, row in enumerate(rows)]


def calibrated_survival(labels: Labels, calibration: Calibration) -> np.ndarray:
    """Survival [N, G]: the product of calibrated confidences up to each position."""
    return np.cumprod(calibration.apply(labels.confidence_NG), axis=1, dtype=np.float64)


def _best(logits_N: np.ndarray, survival_N: np.ndarray, label_N: np.ndarray) -> float:
    """The temperature of one position, given the survival up to the position before it."""
    if len(label_N) < MIN_LABELS:
        return 1.0
    coarse = _GRID[np.argmin([_error(t, logits_N, survival_N, label_N) for t in _GRID])]
    step = np.log(_GRID[1] / _GRID[0])
    fine = coarse * np.exp(np.linspace(-step, step, 2 * _REFINED + 1))
    fine = fine[(fine >= LOWEST) & (fine <= HIGHEST)]
    return float(fine[np.argmin([_error(t, logits_N, survival_N, label_N) for t in fine])])


def _error(temperature: float, logits_N: np.ndarray, survival_N: np.ndarray, label_N: np.ndarray) -> float:
    return expected_calibration_error(survival_N * sigmoid(logits_N / np.float32(temperature)), label_N)
