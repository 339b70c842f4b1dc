"""Temperatures found again in synthetic rounds whose truth is known, and scores against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dspark_serving.errors import DataError
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.calibration_fit import Labels, fit_temperatures, survival_quality
from dspark_serving.scheduler.calibration_quality import expected_calibration_error, quality, reliability

TRUE = (1.6, 0.7, 1.3)


def rounds(rows: int, seed: int, *, censored: bool) -> tuple[Labels, np.ndarray]:
    """Rounds of a head that is off by TRUE, and how many drafts would have been accepted under full verification."""
    rng = np.random.default_rng(seed)
    true_NG = 1 / (1 + np.exp(-rng.normal(1.0, 1.2, (rows, 3))))
    confidence_NG = 1 / (1 + ((1 - true_NG) / true_NG) ** np.array(TRUE))
    alive_NG = np.cumprod(rng.random((rows, 3)) < true_NG, axis=1)
    would_accept_N = alive_NG.sum(axis=1)
    verify_lens_N = np.full(rows, 4)
    if censored:  # as a threshold policy does it: the prefix whose survival is high enough
        verify_lens_N = 1 + (np.cumprod(confidence_NG, axis=1) >= 0.4).sum(axis=1)
    accepted_N = np.minimum(would_accept_N, verify_lens_N - 1)
    return Labels(confidence_NG.astype(np.float32), verify_lens_N, accepted_N), would_accept_N


@pytest.mark.parametrize("censored", [False, True])
def test_the_true_temperatures_are_found(censored: bool) -> None:
    labels, _ = rounds(60_000, 1, censored=censored)
    np.testing.assert_allclose(fit_temperatures(labels).temperatures_G, TRUE, rtol=0.08)


def test_unverified_positions_taken_as_rejected_would_give_a_wrong_answer() -> None:
    labels, _ = rounds(60_000, 1, censored=True)
    as_if_all_verified = labels._replace(verify_lens_N=np.full(len(labels.verify_lens_N), 4))
    assert (np.abs(np.array(fit_temperatures(as_if_all_verified).temperatures_G) / TRUE - 1) > 0.3).any()


def test_fitting_lowers_the_error_on_rounds_that_it_has_not_seen() -> None:
    seen, _ = rounds(40_000, 2, censored=True)
    unseen, _ = rounds(40_000, 3, censored=False)
    calibration = fit_temperatures(seen)
    before = survival_quality(unseen, Calibration.identity(3))
    after = survival_quality(unseen, calibration)
    for position in range(3):
        assert after[position].ece < min(0.012, before[position].ece)
        assert after[position].brier < before[position].brier
    # One temperature cannot change the order of the first position's probabilities.
    assert after[0].auroc == pytest.approx(before[0].auroc, abs=1e-4)
    assert before[0].ece > 0.05  # there was something to mend


def test_a_position_with_few_labels_keeps_its_confidences() -> None:
    labels, _ = rounds(2_000, 4, censored=False)
    verify_lens_N = np.where(np.arange(2_000) < 100, 4, 3)
    fitted = fit_temperatures(labels._replace(verify_lens_N=verify_lens_N, accepted_N=np.minimum(labels.accepted_N, 2)))
    assert fitted.temperatures_G[2] == 1.0
    assert fitted.temperatures_G[0] != 1.0


def test_too_few_rounds_and_rounds_with_broken_confidences_are_refused() -> None:
    labels, _ = rounds(100, 5, censored=False)
    with pytest.raises(DataError, match="100 verified drafts"):
        fit_temperatures(labels)
    labels, _ = rounds(1_000, 5, censored=False)
    broken_NG = labels.confidence_NG.copy()
    broken_NG[:950, 1] = np.nan
    with pytest.raises(DataError, match="50 verified drafts"):
        fit_temperatures(labels._replace(confidence_NG=broken_NG))


def test_scores_agree_with_their_definitions() -> None:
    rng = np.random.default_rng(6)
    probability_N = np.round(rng.random(400), 2)  # rounded: ties for AUROC, and values on the edges of bins
    probability_N[:2] = 0.0, 1.0
    label_N = (rng.random(400) < probability_N**2).astype(float)
    edges = np.linspace(0, 1, 16)
    ece = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (probability_N * 15 >= low * 15 - 1e-9) & ((probability_N * 15 < high * 15 - 1e-9) | (high == 1.0))
        if inside.any():
            ece += abs(probability_N[inside].mean() - label_N[inside].mean()) * inside.mean()
    higher = probability_N[label_N == 1][:, None] - probability_N[label_N == 0][None, :]
    auroc = (higher > 0).mean() + 0.5 * (higher == 0).mean()
    found = quality(probability_N, label_N)
    assert found.ece == pytest.approx(ece, abs=1e-9)
    assert found.brier == pytest.approx(sum((p - y) ** 2 for p, y in zip(probability_N, label_N, strict=True)) / 400)
    assert found.auroc == pytest.approx(auroc)
    assert reliability(probability_N, label_N).count_M.sum() == found.labels == 400


def test_scores_without_labels_or_without_contrast() -> None:
    assert np.isnan(expected_calibration_error(np.zeros(0), np.zeros(0)))
    assert quality(np.zeros(0), np.zeros(0)).labels == 0
    assert np.isnan(quality(np.array([0.2, 0.9]), np.array([1.0, 1.0])).auroc)
