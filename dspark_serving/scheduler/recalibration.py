"""Calibration that follows the traffic: a shift and a slope of the logit for each temperature band and position.

logit p = z + slope * z + shift with z = logit of the frozen calibration's probability; both start at 0. Learned as
logistic regression by Newton steps on sums that forget (one Gaussian step a round of the Laplace approximation), with
a Gaussian prior around 0, so that a band or position without data keeps the frozen calibration.

Only verified positions whose prefix was accepted are labels: P(x_k survives | x_<k did) is what confidence c_k means.
Which of them get verified depends on confidences that the model is given, so the missing ones do not bias it.
"""

from __future__ import annotations

import numpy as np

from dspark_serving.scheduler.calibration import Calibration, logit, sigmoid

BANDS = ("greedy", "warm", "hot")
"""Temperature 0; up to 0.7; above: acceptance by argmax and by rejection sampling are different labels."""
_ALL_GREEDY = np.zeros(1, dtype=np.int64)
_BAND_ENDS = np.array([0.0, 0.7], dtype=np.float32)
MEMORY, SHORT_MEMORY = 2000.0, 100.0  # labels of a cell, ordinarily and after a drift
SHIFT_PRECISION, SLOPE_PRECISION = 4.0, 16.0  # of the prior: standard deviations of 0.5 and 0.25
SHIFT_LIMIT, SLOPE_LIMIT = 4.0, 0.7
TILT, ALARM = 0.5, 12.0  # a drift of this many logits is looked for; log of the labels between two false alarms, about


class OnlineCalibration:
    """The frozen calibration, corrected by what became of earlier rounds' drafts."""

    def __init__(self, base: Calibration) -> None:
        """Start with `base` unchanged."""
        cells = len(BANDS), base.gamma
        self.drifts = 0
        """Drifts found so far."""
        self._base = base
        self._position_G = np.arange(base.gamma)
        self._shift_BG, self._slope_BG = np.zeros(cells), np.zeros(cells)
        self._precision_BG = np.full(cells, SHIFT_PRECISION)  # of the shift, of both together, of the slope
        self._cross_BG = np.zeros(cells)
        self._slope_precision_BG = np.full(cells, SLOPE_PRECISION)
        self._too_low_BG, self._too_high_BG = np.zeros(cells), np.zeros(cells)  # evidence that probabilities are
        self._settling_BG = np.zeros(cells)  # labels that still count as after a drift
        self._sums_2G = np.zeros((2, base.gamma))  # of all bands lately: labels, observed - predicted
        self._line_2BG = np.zeros((2, *cells), dtype=np.float32)  # what `apply` does: factor and addend of raw logits
        self._publish()

    @property
    def drifting(self) -> bool:
        """Some band and position is being learned anew."""
        return bool((self._settling_BG > 0).any())

    @property
    def error_G(self) -> np.ndarray:
        """|mean predicted - mean observed| of each position over its last labels; nan without any."""
        labels_G, residual_G = self._sums_2G
        return np.abs(residual_G) / np.where(labels_G > 0, labels_G, np.nan)

    @property
    def line_2BG(self) -> np.ndarray:
        """Factor and addend of raw logits for each band and position, float32: what `apply` does."""
        return self._line_2BG

    def apply(self, confidence_RG: np.ndarray, temperature_R: np.ndarray) -> np.ndarray:
        """Calibrated confidences [R, G] float32 of confidences in [0, 1], from earlier rounds' labels only.

        They lie in memory position by position, as admission takes them.
        """
        if np.count_nonzero(temperature_R) == 0:
            band_R = _ALL_GREEDY
        else:
            band_R = bands(temperature_R)
            if band_R[0] == band_R[-1] and (band_R == band_R[0]).all():
                band_R = band_R[:1]
        return self._correct(logit(confidence_RG.T), band_R).T

    def observe(
        self, confidence_RG: np.ndarray, verify_lens_R: np.ndarray, accepted_R: np.ndarray, temperature_R: np.ndarray
    ) -> None:
        """Learn from a finished round: confidences as the head gave them, lengths with and accepted without anchor.

        Positions with a confidence that is no probability are left out.
        """
        label_RG = self._position_G < np.minimum(verify_lens_R - 1, accepted_R + 1)[:, None]
        label_RG &= (confidence_RG >= 0) & (confidence_RG <= 1)
        if not label_RG.any():
            return
        band_R = bands(temperature_R)
        raw_RG = logit(np.where(label_RG, confidence_RG, np.float32(0.5)))
        z_RG = raw_RG * self._base.scale_G
        predicted_RG = self._correct(raw_RG.T.copy(), band_R).T
        values_6RG = np.empty((6, *label_RG.shape))
        values_6RG[0] = label_RG
        values_6RG[1] = label_RG * ((self._position_G < accepted_R[:, None]) - predicted_RG)
        values_6RG[2] = values_6RG[1] * z_RG
        values_6RG[3] = label_RG * (predicted_RG * (1 - predicted_RG))
        values_6RG[4] = values_6RG[3] * z_RG
        values_6RG[5] = values_6RG[4] * z_RG
        member_BR = np.equal.outer(np.arange(len(BANDS)), band_R).astype(np.float64)
        sums_6BG = np.einsum("br,vrg->vbg", member_BR, values_6RG)
        self._learn(sums_6BG)
        self._look_for_drift(labels_BG=sums_6BG[0], residual_BG=sums_6BG[1], information_BG=sums_6BG[3])
        counts_2G = sums_6BG[:2].sum(axis=1)
        self._sums_2G = np.exp(-counts_2G[0] / MEMORY) * self._sums_2G + counts_2G
        self._publish()

    def _correct(self, logits_GR: np.ndarray, band_R: np.ndarray) -> np.ndarray:
        """Probabilities of raw logits [G, R], which are overwritten; `band_R` is one band for all, [1], or of each."""
        factor_GR, addend_GR = self._line_2BG.transpose(0, 2, 1).take(band_R, axis=2)
        logits_GR *= factor_GR
        logits_GR += addend_GR
        return sigmoid(logits_GR)

    def _learn(self, sums_6BG: np.ndarray) -> None:
        """A Newton step from the sums of a round; what is forgotten is replaced by the prior."""
        labels_BG, gradient_BG, slope_gradient_BG, *information = sums_6BG
        shift_BG, slope_BG = self._shift_BG, self._slope_BG
        keep_BG = np.exp(-labels_BG / np.where(self._settling_BG > 0, SHORT_MEMORY, MEMORY))
        cross_BG = keep_BG * self._cross_BG
        # With theta = (shift, slope): old precision, then (old precision) theta + information theta + gradient.
        known_BG, slope_known_BG = keep_BG * self._precision_BG, keep_BG * self._slope_precision_BG
        gradient_BG = gradient_BG + (known_BG + information[0]) * shift_BG + (cross_BG + information[1]) * slope_BG
        slope_gradient_BG = (
            slope_gradient_BG + (cross_BG + information[1]) * shift_BG + (slope_known_BG + information[2]) * slope_BG
        )
        forgotten_BG = 1.0 - keep_BG
        self._precision_BG = a = known_BG + forgotten_BG * SHIFT_PRECISION + information[0]
        self._cross_BG = b = cross_BG + information[1]
        self._slope_precision_BG = c = slope_known_BG + forgotten_BG * SLOPE_PRECISION + information[2]
        determinant_BG = a * c - b * b  # > 0: the prior is positive definite, and information never negative
        slope_BG = (a * slope_gradient_BG - b * gradient_BG) / determinant_BG
        self._slope_BG = np.minimum(np.maximum(slope_BG, -SLOPE_LIMIT), SLOPE_LIMIT)
        shift_BG = (gradient_BG - b * self._slope_BG) / a  # the best one with this slope
        self._shift_BG = np.minimum(np.maximum(shift_BG, -SHIFT_LIMIT), SHIFT_LIMIT)

    def _look_for_drift(self, *, labels_BG: np.ndarray, residual_BG: np.ndarray, information_BG: np.ndarray) -> None:
        """CUSUM of the log-likelihood ratio of probabilities tilted by +-TILT logits, to second order."""
        toll_BG = 0.5 * TILT**2 * information_BG
        self._too_low_BG = np.maximum(self._too_low_BG + TILT * residual_BG - toll_BG, 0.0)
        self._too_high_BG = np.maximum(self._too_high_BG - TILT * residual_BG - toll_BG, 0.0)
        self._settling_BG = np.maximum(self._settling_BG - labels_BG, 0.0)
        alarm_BG = np.maximum(self._too_low_BG, self._too_high_BG) > ALARM
        if alarm_BG.any():
            self.drifts += int(alarm_BG.sum())
            self._settling_BG[alarm_BG] = 2 * SHORT_MEMORY
            self._too_low_BG[alarm_BG] = self._too_high_BG[alarm_BG] = 0.0

    def _publish(self) -> None:
        self._line_2BG[0] = (1.0 + self._slope_BG) * self._base.scale_G
        self._line_2BG[1] = self._shift_BG


def bands(temperature_R: np.ndarray) -> np.ndarray:
    """Index into BANDS of each request; a temperature that is no number counts as hot."""
    return _BAND_ENDS.searchsorted(temperature_R)
