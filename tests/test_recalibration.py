"""Online recalibration against traffic whose true probabilities are known."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.recalibration import OnlineCalibration

GAMMA, REQUESTS = 3, 8


class Traffic:
    """Confidences of a head that is off by a shift and a factor of the logit, verified as a threshold policy does."""

    def __init__(self, seed: int, *, shift: float = 0.0, factor: float = 1.0, temperature: float = 0.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.shift, self.factor = shift, factor
        self.temperature_R = np.full(REQUESTS, temperature, dtype=np.float32)

    def rounds(self, online: OnlineCalibration, count: int, *, threshold: float = 0.2) -> float:
        """Mean |calibrated - true| over the second half of `count` rounds."""
        errors = []
        for _ in range(count):
            logits_RG = self.rng.normal(0.8, 1.0, (REQUESTS, GAMMA))
            true_RG = 1 / (1 + np.exp(-(self.factor * logits_RG + self.shift)))
            confidence_RG = (1 / (1 + np.exp(-logits_RG))).astype(np.float32)
            calibrated_RG = online.apply(confidence_RG, self.temperature_R)
            errors.append(float(np.abs(calibrated_RG - true_RG).mean()))
            lens_R = 1 + (np.cumprod(calibrated_RG, axis=1) >= threshold).sum(axis=1)
            alive_R = np.cumprod(self.rng.random(true_RG.shape) < true_RG, axis=1).sum(axis=1)
            online.observe(confidence_RG, lens_R, np.minimum(alive_R, lens_R - 1), self.temperature_R)
        return float(np.mean(errors[count // 2 :]))


def new(*temperatures: float) -> OnlineCalibration:
    return OnlineCalibration(Calibration(temperatures or (1.0,) * GAMMA))


@pytest.mark.parametrize(("shift", "factor"), [(-1.0, 1.0), (0.8, 1.0), (0.0, 0.6), (-0.5, 1.4)])
def test_a_wrong_head_is_corrected_from_verified_positions_alone(shift: float, factor: float) -> None:
    frozen = Traffic(0, shift=shift, factor=factor)
    never_told = OnlineCalibration(Calibration.identity(GAMMA))
    never_told.observe = lambda *_: None  # type: ignore[method-assign]
    before = frozen.rounds(never_told, 200)
    after = Traffic(0, shift=shift, factor=factor).rounds(new(), 1000)
    assert before > 0.05
    assert after < min(0.03, before / 3)


def test_unverified_positions_taken_as_rejected_would_spoil_a_good_head() -> None:
    right, wrong, traffic = new(), new(), Traffic(1)
    for _ in range(400):
        confidence_RG = traffic.rng.uniform(0.3, 0.95, (REQUESTS, GAMMA)).astype(np.float32)
        lens_R = 1 + (np.cumprod(confidence_RG, axis=1) >= 0.5).sum(axis=1)
        alive_R = np.cumprod(traffic.rng.random(confidence_RG.shape) < confidence_RG, axis=1).sum(axis=1)
        accepted_R = np.minimum(alive_R, lens_R - 1)
        right.observe(confidence_RG, lens_R, accepted_R, traffic.temperature_R)
        wrong.observe(confidence_RG, np.full(REQUESTS, GAMMA + 1), accepted_R, traffic.temperature_R)
    probe_RG = np.full((1, GAMMA), 0.7, dtype=np.float32)
    greedy_R = np.zeros(1, dtype=np.float32)
    np.testing.assert_allclose(right.apply(probe_RG, greedy_R), 0.7, atol=0.05)
    assert (wrong.apply(probe_RG, greedy_R) < 0.55).any()


def test_a_drift_is_noticed_and_followed() -> None:
    online, traffic = new(), Traffic(2)
    traffic.rounds(online, 800)
    assert online.drifts == 0
    assert not online.drifting
    traffic.shift = -1.5
    shocked = traffic.rounds(online, 4)
    seen_drifting = False
    for _ in range(40):
        traffic.rounds(online, 4)
        seen_drifting = seen_drifting or online.drifting
    assert seen_drifting
    assert online.drifts > 0
    settled = traffic.rounds(online, 400, threshold=0.0)
    assert not online.drifting
    assert settled < 0.06 < shocked


def test_false_alarms_are_rare() -> None:
    online = new()
    for seed in range(5):
        Traffic(seed).rounds(online, 400)
    assert online.drifts <= 2


def test_a_round_changes_later_rounds_only() -> None:
    online, traffic = new(1.2, 0.8, 1.0), Traffic(3, shift=-1.0)
    traffic.rounds(online, 50)
    confidence_RG = traffic.rng.random((REQUESTS, GAMMA)).astype(np.float32)
    before_RG = online.apply(confidence_RG, traffic.temperature_R)
    online.apply(traffic.rng.random((REQUESTS, GAMMA)).astype(np.float32), traffic.temperature_R)
    np.testing.assert_array_equal(online.apply(confidence_RG, traffic.temperature_R), before_RG)
    # One position's result depends on that position's confidence alone.
    other_RG = confidence_RG.copy()
    other_RG[:, 1:] = 0.5
    np.testing.assert_array_equal(online.apply(other_RG, traffic.temperature_R)[:, 0], before_RG[:, 0])
    online.observe(confidence_RG, np.full(REQUESTS, 4), np.zeros(REQUESTS, dtype=np.int32), traffic.temperature_R)
    assert (online.apply(confidence_RG, traffic.temperature_R)[:, 0] < before_RG[:, 0]).all()


def test_the_base_holds_without_data_and_where_nothing_was_verified() -> None:
    base = Calibration((1.5, 0.7, 2.0))
    online, traffic = OnlineCalibration(base), Traffic(4, shift=-1.0, temperature=0.6)
    confidence_RG = traffic.rng.random((REQUESTS, GAMMA)).astype(np.float32)
    np.testing.assert_allclose(online.apply(confidence_RG, traffic.temperature_R), base.apply(confidence_RG), atol=1e-6)
    traffic.rounds(online, 300, threshold=0.2)
    greedy_R, hot_R = np.zeros(REQUESTS, dtype=np.float32), np.ones(REQUESTS, dtype=np.float32)
    for untouched_R in (greedy_R, hot_R):
        np.testing.assert_allclose(online.apply(confidence_RG, untouched_R), base.apply(confidence_RG), atol=1e-6)
    assert (online.apply(confidence_RG, traffic.temperature_R)[:, 0] < base.apply(confidence_RG)[:, 0]).all()
    # A mixed batch is the same as its requests one by one.
    mixed_R = np.array([0.0, 0.6, 1.0, 0.7, 0.71, 0.0, 2.0, 0.1], dtype=np.float32)
    one_by_one = [online.apply(confidence_RG[r : r + 1], mixed_R[r : r + 1]) for r in range(REQUESTS)]
    np.testing.assert_array_equal(online.apply(confidence_RG, mixed_R), np.concatenate(one_by_one))


def test_a_few_labels_move_it_little() -> None:
    online = new()
    confidence_RG = np.full((2, GAMMA), 0.9, dtype=np.float32)
    greedy_R = np.zeros(2, dtype=np.float32)
    online.observe(confidence_RG, np.full(2, 4), np.zeros(2, dtype=np.int32), greedy_R)
    moved_G = 0.9 - online.apply(confidence_RG, greedy_R)[0]
    assert 0.0 < moved_G[0] < 0.15
    np.testing.assert_allclose(moved_G[1:], 0.0, atol=1e-6)  # never reached: no labels


def test_the_reported_error_is_the_difference_of_the_means() -> None:
    online = new()
    greedy_R = np.zeros(4, dtype=np.float32)
    assert np.isnan(online.error_G).all()
    confidence_RG = np.full((4, GAMMA), 0.8, dtype=np.float32)
    online.observe(confidence_RG, np.full(4, 3), np.array([2, 1, 1, 0]), greedy_R)
    # Position 1: three of four survived; position 2: one of the three that got there; position 3 was not verified.
    np.testing.assert_allclose(online.error_G[:2], [0.8 - 3 / 4, 0.8 - 1 / 3], atol=1e-6)
    assert np.isnan(online.error_G[2])


def test_confidences_that_are_no_probabilities_teach_nothing() -> None:
    online = new()
    greedy_R = np.zeros(4, dtype=np.float32)
    broken_RG = np.array([[np.nan] * 3, [np.inf] * 3, [-0.1] * 3, [1.5] * 3], dtype=np.float32)
    online.observe(broken_RG, np.full(4, 4), np.zeros(4, dtype=np.int32), greedy_R)
    probe_RG = np.full((4, GAMMA), 0.6, dtype=np.float32)
    np.testing.assert_allclose(online.apply(probe_RG, greedy_R), 0.6, atol=1e-6)


def test_certainty_that_is_always_wrong_stays_finite() -> None:
    online = new()
    greedy_R = np.zeros(4, dtype=np.float32)
    certain_RG = np.ones((4, GAMMA), dtype=np.float32)
    with np.errstate(all="raise"):
        for _ in range(300):
            online.observe(certain_RG, np.full(4, 4), np.zeros(4, dtype=np.int32), greedy_R)
        calibrated_RG = online.apply(certain_RG, greedy_R)
    assert np.isfinite(calibrated_RG).all()
    assert calibrated_RG[0, 0] < 0.6
