"""What is believed of requests before their confidences are known."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_serving.scheduler.round import Batch
from dspark_serving.scheduler.survival import AcceptancePrior, HostHistory, calibrated, sanitise

PRIOR_G = np.array([0.5, 0.25, 0.125], dtype=np.float32)


def batch(slots: list[int], generations: list[int] | None = None) -> Batch:
    slots_R = np.array(slots, dtype=np.int64)
    return Batch.ordinary(slots_R, slots_R + 10, None if generations is None else np.array(generations))


def test_unusable_confidences_count_as_one_and_are_counted() -> None:
    confidence_RG = np.array([[0.5, np.nan, 0.5], [np.inf, -0.1, 1.1], [0.0, 1.0, -np.inf]], dtype=np.float32)
    clean_RG, bad = sanitise(confidence_RG)
    assert clean_RG.tolist() == [[0.5, 1.0, 0.5], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    assert bad == 5


def test_good_confidences_are_left_alone() -> None:
    confidence_RG = np.array([[0.0, 1.0]], dtype=np.float32)
    assert sanitise(confidence_RG) == (confidence_RG, 0)
    assert sanitise(np.zeros((0, 4)))[0].shape == (0, 4)


def test_a_calibration_sees_clean_confidences_and_may_not_leave_the_range() -> None:
    seen = []

    def doubles(confidence_RG: np.ndarray, temperature_R: np.ndarray) -> np.ndarray:
        seen.append(confidence_RG)
        return confidence_RG * 2

    clean_RG, bad = calibrated(np.array([[0.25, np.nan]]), np.zeros(1), doubles)
    assert seen[0].tolist() == [[0.25, 1.0]]
    assert (clean_RG.tolist(), bad) == ([[0.5, 1.0]], 1)


def test_prior_learns_the_true_acceptance_behind_a_selective_cut() -> None:
    # The cut keeps what looks promising; acceptances of verified positions alone would be far too high.
    rng = np.random.default_rng(0)
    prior = AcceptancePrior(3, memory=20_000)
    for _ in range(200):
        confidence_RG = rng.choice([0.9, 0.3], size=(32, 3)).astype(np.float32)
        survives_RG = rng.random((32, 3)) < confidence_RG
        lens_R = 1 + (np.cumprod(confidence_RG, axis=1) >= 0.5).sum(axis=1)
        accepted_R = np.minimum(np.cumprod(survives_RG, axis=1).sum(axis=1), lens_R - 1)
        prior.observe(confidence_RG, lens_R, accepted_R)
    assert prior.survival_G == pytest.approx([0.6, 0.36, 0.216], abs=0.02)


def test_prior_counts_only_labels_when_everything_is_verified() -> None:
    prior = AcceptancePrior(2, acceptance=0.5, strength=1e-6)
    # Confidences lie; with full verification they have no say. Position 2 has one label: only one block reached it.
    prior.observe(np.full((2, 2), 0.99), np.array([3, 3]), np.array([0, 2]))
    assert prior.survival_G == pytest.approx([0.5, 0.5], abs=1e-3)


def test_prior_follows_a_change_sooner_after_doubt() -> None:
    def after_change(doubt: bool) -> float:
        prior = AcceptancePrior(1)
        for _ in range(100):
            prior.observe(np.ones((8, 1)), np.full(8, 2), np.full(8, 1))
        if doubt:
            prior.doubt(8.0)
        prior.observe(np.ones((8, 1)), np.full(8, 2), np.zeros(8, dtype=int))
        return float(prior.survival_G[0])

    assert after_change(doubt=False) > 0.9
    assert after_change(doubt=True) < 0.65


def test_history_belongs_to_a_request_not_to_a_slot() -> None:
    history = HostHistory(3, slots=4)
    history.observe(batch([2, 0], [1, 1]), np.array([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]], dtype=np.float32))
    now = batch([0, 1, 2], [1, 1, 2])  # the same request; a new one; a new one in a used slot
    rows_RHG = history.sample(now, 1, 1, PRIOR_G)
    assert rows_RHG[0, 0].tolist() == pytest.approx([0.6, 0.5, 0.4])
    assert rows_RHG[1, 0].tolist() == rows_RHG[2, 0].tolist() == PRIOR_G.tolist()


def test_history_gives_the_latest_rounds_first_and_the_prior_behind_them() -> None:
    history = HostHistory(1, slots=1, depth=2)
    for value in (0.1, 0.2, 0.3):
        history.observe(batch([0]), np.array([[value]], dtype=np.float32))
    now = batch([0])
    assert history.sample(now, 1, 1, PRIOR_G[:1]).ravel() == pytest.approx([0.3])
    assert history.sample(now, 1, 4, PRIOR_G[:1]).ravel() == pytest.approx([0.3, 0.2])
    fresh = HostHistory(1, slots=1, depth=4)
    fresh.observe(now, np.array([[0.9]], dtype=np.float32))
    assert fresh.sample(now, 1, 4, PRIOR_G[:1]).ravel() == pytest.approx([0.9])
    assert fresh.sample(now, 3, 4, PRIOR_G[:1]).ravel() == pytest.approx([0.9, 0.5, 0.5])


def test_history_goes_stale_while_nothing_is_drafted() -> None:
    history = HostHistory(1, slots=1, stale_after=2)
    now, prior_G = batch([0]), PRIOR_G[:1]
    history.observe(now, np.full((1, 1), 0.9, dtype=np.float32))
    seen = []
    for _ in range(6):
        seen.append(float(history.sample(now, 1, 1, prior_G)[0, 0, 0]))
        history.pass_round()
    assert seen == pytest.approx([0.9, 0.9, 0.9, 0.9, 0.5, 0.5])
    assert history.newcomers(now) == 1
    history.observe(now, np.full((1, 1), 0.8, dtype=np.float32))
    assert history.newcomers(now) == 0
    # What was stale does not come back with a fresh row.
    assert history.sample(now, 2, 2, prior_G).ravel() == pytest.approx([0.8, 0.5])
