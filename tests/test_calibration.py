"""Temperatures of the positions: applied, written, read, and refused when they are someone else's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dspark_serving.errors import CheckpointError
from dspark_serving.scheduler.calibration import Calibration

THREE = Calibration((0.5, 1.0, 2.0), {"rounds": 10, "labels": [10, 8, 5]})


def test_a_temperature_divides_the_logit() -> None:
    confidence_RG = np.random.default_rng(0).uniform(0.01, 0.99, (50, 3))
    expected = 1 / (1 + ((1 - confidence_RG) / confidence_RG) ** (1 / np.array([0.5, 1.0, 2.0])))
    np.testing.assert_allclose(THREE.apply(confidence_RG), expected, rtol=1e-5)


def test_extremes_stay_probabilities_and_the_input_is_not_touched() -> None:
    confidence_RG = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [np.nan, 0.3, np.nan]], dtype=np.float32)
    before = confidence_RG.copy()
    for temperature in (0.2, 0.9, 5.0):
        calibrated_RG = Calibration((temperature,) * 3).apply(confidence_RG)
        assert np.isfinite(calibrated_RG[:2]).all()
        assert (calibrated_RG[0] < 0.1).all()
        assert (calibrated_RG[1] > 0.9).all()
        assert np.isnan(calibrated_RG[2]).tolist() == [True, False, True]
    np.testing.assert_array_equal(confidence_RG, before)


def test_identity_changes_nothing() -> None:
    confidence_RG = np.array([[0.0, 0.25, 1.0]], dtype=np.float32)
    np.testing.assert_array_equal(Calibration.identity(3).apply(confidence_RG), confidence_RG)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    THREE.save(tmp_path / "new" / "calibration.json")
    assert Calibration.load(tmp_path / "new" / "calibration.json", 3) == THREE
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be used"),
        (b'{"version": 1, "gamma": 3', "cannot be used"),
        (b"[1.0, 1.0, 1.0]", "cannot be used"),
        (b"\xff\xfe\x00", "cannot be used"),
        ({"version": 2}, "cannot be used"),
        ({"temperatures": None}, "cannot be used"),
        ({"temperatures": ["warm", 1.0, 1.0]}, "cannot be used"),
        ({"surprise": 1}, "cannot be used"),
        ({"gamma": 7, "temperatures": [1.0] * 7}, "block size of 7"),
        ({"temperatures": [1.0, 1.0]}, "2 temperatures"),
        ({"temperatures": [1.0, -1.0, 1.0]}, "-1.0"),
        ({"temperatures": [1.0, 0.0, 1.0]}, "0.0"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, content: bytes | dict[str, object], says: str) -> None:
    path = tmp_path / "calibration.json"
    if isinstance(content, dict):
        good: dict[str, object] = {"version": 1, "gamma": 3, "temperatures": [1.0, 1.0, 1.0], "fitted_on": {}}
        content = json.dumps(good | content).encode()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="dspark calibrate") as caught:
        Calibration.load(path, 3)
    assert says in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        Calibration.load(tmp_path / "calibration.json", 3)


def test_a_temperature_that_is_no_number_is_refused() -> None:
    with pytest.raises(CheckpointError, match="nan"):
        Calibration((1.0, float("nan")))
