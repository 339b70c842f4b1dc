"""Confidences from draft distributions: what the statistics are, and what a fit finds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dspark_serving.errors import DataError
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.recalibration import OnlineCalibration
from dspark_serving.scheduler.survival_map import (
    MIN_LABELS,
    STATISTICS,
    Line,
    MapLabels,
    SurvivalMap,
    draft_statistics,
    fit_survival_map,
)

GAMMA = 3

# ---- statistics


def test_statistics_agree_with_their_definitions() -> None:
    rng = np.random.default_rng(0)
    logits_RGV = rng.normal(0, 3, (4, GAMMA, 40))
    found_RG3 = draft_statistics(torch.tensor(logits_RGV)).numpy()
    for index in np.ndindex(4, GAMMA):
        p_V = np.exp(logits_RGV[index]) / np.exp(logits_RGV[index]).sum()
        second, first = np.sort(p_V)[-2:]
        entropy = -(p_V * np.log(p_V)).sum() / math.log(40)
        expected = [math.log(first / (1 - first)), math.log(first / second), entropy]
        np.testing.assert_allclose(found_RG3[index], expected, rtol=1e-4, atol=1e-5)


def test_statistics_of_probabilities_at_hand_are_the_same() -> None:
    logits_RV = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(draft_statistics(logits_RV), draft_statistics(logits_RV, logits_RV.softmax(dim=1)))


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], [math.log(1 / 3), 0.0, 1.0]),
        ([0.0, 1e4, 0.0, 0.0], [13.8, 20.0, 0.0]),
        ([-math.inf, 0.0, 0.0, -math.inf], [0.0, 0.0, 0.5]),
        ([-math.inf, 0.0, -math.inf, -math.inf], [13.8, 20.0, 0.0]),
    ],
    ids=["uniform", "certain", "masked", "one left"],
)
def test_statistics_at_the_edges_are_finite(logits: list[float], expected: list[float]) -> None:
    assert draft_statistics(torch.tensor(logits)).tolist() == pytest.approx(expected, abs=1e-5)


# ---- the map


def test_the_default_takes_a_greedy_drafter_at_its_word() -> None:
    logits_RGV = torch.randn(6, GAMMA, 20, generator=torch.Generator().manual_seed(1)) * 3
    confidence_RG = SurvivalMap.default(GAMMA).apply(draft_statistics(logits_RGV), torch.zeros(6))
    assert torch.allclose(confidence_RG, logits_RGV.softmax(dim=2).amax(dim=2), atol=1e-5)


def test_confidences_lie_within_zero_and_one_and_grow_with_certainty() -> None:
    logits_RGV = torch.zeros(50, GAMMA, 10)
    logits_RGV[:, :, 4] = torch.linspace(0, 60, 50)[:, None]
    for temperature in (0.0, 0.5, 1.3):
        confidence_RG = SurvivalMap.default(GAMMA).apply(draft_statistics(logits_RGV), torch.full((50,), temperature))
        assert bool(((confidence_RG > 0) & (confidence_RG < 1)).all())
        assert bool((confidence_RG.diff(dim=0) >= 0).all())
        assert bool(confidence_RG[-1, 0] > confidence_RG[0, 0] + 0.3)


def test_each_request_gets_the_coefficients_of_its_kind_and_position() -> None:
    found = SurvivalMap(Line((1.0, 0.0, 0.0), (0.0, 1.0)), Line((0.0, 0.0, -2.0), (0.5, -0.5)))
    statistics_RG3 = torch.tensor([[[0.3, 9.0, 0.9], [-0.2, 9.0, 0.1]]]).expand(2, 2, 3)
    confidence_RG = found.apply(statistics_RG3, torch.tensor([0.0, 0.8]))
    expected_RG = torch.tensor([[0.3, 0.8], [0.5 - 1.8, -0.5 - 0.2]]).sigmoid()
    assert torch.allclose(confidence_RG, expected_RG)


# ---- fitting

TRUE = SurvivalMap(
    Line((0.6, 0.3, -1.0), (0.4, 0.0, -0.5)),
    Line((0.2, 0.1, 0.5), (1.0, 0.8, 0.2)),
)


def rounds(rows: int, seed: int, *, censored: bool) -> MapLabels:
    """Rounds in which acceptance follows TRUE; censored as a threshold policy does it, by the default's confidences."""
    rng = np.random.default_rng(seed)
    logits_NGV = torch.tensor(rng.normal(0, 1, (rows, GAMMA, 12)) * rng.uniform(0.5, 5, (rows, GAMMA, 1)))
    statistics_NG3 = draft_statistics(logits_NGV)
    temperature_N = rng.choice([0.0, 0.7, 1.0], rows)
    true_NG = TRUE.apply(statistics_NG3, torch.tensor(temperature_N)).numpy()
    would_accept_N = np.cumprod(rng.random((rows, GAMMA)) < true_NG, axis=1).sum(axis=1)
    verify_lens_N = np.full(rows, GAMMA + 1)
    if censored:
        shown_NG = SurvivalMap.default(GAMMA).apply(statistics_NG3, torch.tensor(temperature_N)).numpy()
        verify_lens_N = 1 + (np.cumprod(shown_NG, axis=1) >= 0.25).sum(axis=1)
    accepted_N = np.minimum(would_accept_N, verify_lens_N - 1)
    return MapLabels(statistics_NG3.numpy(), temperature_N, verify_lens_N, accepted_N)


def error(found: SurvivalMap, labels: MapLabels) -> float:
    """Mean difference from the true confidences."""
    temperature_N, statistics_NG3 = torch.tensor(labels.temperature_N), torch.from_numpy(labels.statistics_NG3)
    return float((found.apply(statistics_NG3, temperature_N) - TRUE.apply(statistics_NG3, temperature_N)).abs().mean())


@pytest.mark.parametrize("censored", [False, True])
def test_a_fit_finds_the_true_map(censored: bool) -> None:
    unseen = rounds(4_000, 8, censored=False)
    assert error(SurvivalMap.default(GAMMA), unseen) > 0.1, "the control: there is something to learn"
    assert error(fit_survival_map(rounds(40_000, 7, censored=censored)), unseen) < 0.015


def test_unverified_positions_taken_as_rejected_would_give_a_wrong_map() -> None:
    labels = rounds(40_000, 7, censored=True)
    as_if_all_verified = labels._replace(verify_lens_N=np.full(len(labels.verify_lens_N), GAMMA + 1))
    assert error(fit_survival_map(as_if_all_verified), rounds(4_000, 8, censored=False)) > 0.05


def test_a_kind_of_requests_without_labels_keeps_the_default() -> None:
    labels = rounds(2_000, 9, censored=False)
    labels = labels._replace(temperature_N=np.zeros(2_000))
    labels.statistics_NG3[:50] = np.nan  # of a drafter that computed nonsense
    found = fit_survival_map(labels)
    assert found.sampled == SurvivalMap.default(GAMMA).sampled
    assert found.greedy != SurvivalMap.default(GAMMA).greedy
    assert found.fitted_on["sampled_labels"] == 0


def test_too_few_labels_are_refused() -> None:
    labels = rounds(MIN_LABELS // 2, 9, censored=False)._replace(verify_lens_N=np.full(MIN_LABELS // 2, 2))
    with pytest.raises(DataError, match="labels of greedy"):
        fit_survival_map(labels)


def test_labels_that_always_survive_give_a_finite_map() -> None:
    labels = rounds(2_000, 10, censored=False)._replace(accepted_N=np.full(2_000, GAMMA))
    found = fit_survival_map(labels)
    assert float(found.apply(torch.from_numpy(labels.statistics_NG3), torch.zeros(2_000)).mean()) > 0.98


def test_a_drafter_that_is_off_is_corrected_online_like_a_head() -> None:
    """The default's error goes away in the correction that follows the traffic, without a fit."""
    labels, online = rounds(20_000, 11, censored=True), OnlineCalibration(Calibration.identity(GAMMA))
    temperature_N = torch.tensor(labels.temperature_N)
    statistics_NG3 = torch.from_numpy(labels.statistics_NG3)
    shown_NG = SurvivalMap.default(GAMMA).apply(statistics_NG3, temperature_N).numpy()
    for part in np.split(np.arange(20_000), 1_000):
        online.observe(shown_NG[part], labels.verify_lens_N[part], labels.accepted_N[part], labels.temperature_N[part])
    true_NG = TRUE.apply(statistics_NG3, temperature_N).numpy()
    corrected_NG = online.apply(shown_NG, labels.temperature_N)
    assert np.abs(corrected_NG - true_NG).mean() < 0.4 * np.abs(shown_NG - true_NG).mean()


# ---- the file


def test_a_saved_map_comes_back(tmp_path: Path) -> None:
    fitted = fit_survival_map(rounds(3_000, 12, censored=False))
    fitted.save(tmp_path / "there" / "survival_map.json")
    found = SurvivalMap.load(tmp_path / "there" / "survival_map.json", GAMMA)
    assert found == fitted
    assert found.fitted_on == fitted.fitted_on


def written(path: Path, **changes: Any) -> Path:
    SurvivalMap.default(GAMMA).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 5}, "for block size 5"),
        ({"greedy": {"weights": [1, 0, 0], "biases": [0.0] * 4}}, "with 4 and 3 biases"),
        ({"greedy": {"weights": [1, 0], "biases": [0.0] * 3}}, r"greedy\.weights"),
        ({"greedy": {"weights": [math.nan, 0, 0], "biases": [0.0] * 3}}, r"greedy\.weights\.0.*finite"),
        ({"sampled": {"weights": [1, 0, 0], "biases": [0.0, math.inf, 0.0]}}, r"sampled\.biases\.1.*finite"),
        ({"sampled": {"weights": [1e9, 0, 0], "biases": [0.0] * 3}}, "coefficients"),
        ({"sampled": {"weights": ["1", 0, 0], "biases": [0.0] * 3}}, r"sampled\.weights\.0"),
        ({"statistics": list(STATISTICS[::-1])}, "is of"),
        ({"version": 2}, "version"),
        ({"more": 1}, "more"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SurvivalMap.load(written(tmp_path / "survival_map.json", **changes), GAMMA)


def test_a_missing_or_cut_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "survival_map.json")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="Invalid JSON"):
        SurvivalMap.load(path, GAMMA)
    with pytest.raises(DataError, match="No such file"):
        SurvivalMap.load(tmp_path / "none.json", GAMMA)
