"""The arithmetic of the comparison of feature codecs."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.feature_codecs import loss_of_length

EXACT_P2 = np.array([[30, 10], [50, 25], [90, 30]])  # tokens and rounds of three answers


def test_nothing_is_lost_against_oneself() -> None:
    assert loss_of_length(EXACT_P2, EXACT_P2) == (0.0, 0.0, 0.0)


def test_a_tenth_more_rounds_everywhere_is_a_loss_without_doubt() -> None:
    lost, low, high = loss_of_length(EXACT_P2 * np.array([1, 1.1]), EXACT_P2)
    assert (lost, low, high) == pytest.approx((1 - 1 / 1.1,) * 3)


def test_a_loss_in_one_answer_only_is_uncertain() -> None:
    lost, low, high = loss_of_length(np.array([[30, 10], [50, 25], [90, 40]]), EXACT_P2)
    assert lost == pytest.approx(1 - (170 / 75) / (170 / 65))
    assert low == 0.0 < lost < high
