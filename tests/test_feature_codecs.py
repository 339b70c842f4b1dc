"""The arithmetic of the comparison of feature codecs."""

from __future__ import annotations

import numpy as np
import pytest
from dspark_training.evaluation.figures import Totals

from benchmarks.feature_codecs import loss_of_length

TOKENS_Q = np.array([30, 50, 90])
EXACT = Totals(TOKENS_Q, np.array([10, 25, 30]))


def test_nothing_is_lost_against_oneself() -> None:
    assert loss_of_length(EXACT, EXACT) == (0.0, 0.0, 0.0)


def test_a_tenth_more_rounds_everywhere_is_a_loss_without_doubt() -> None:
    lost, low, high = loss_of_length(Totals(TOKENS_Q, 1.1 * EXACT.rounds_Q), EXACT)
    assert (lost, low, high) == pytest.approx((1 - 1 / 1.1,) * 3)


def test_a_loss_in_one_answer_only_is_uncertain() -> None:
    lost, low, high = loss_of_length(Totals(TOKENS_Q, np.array([10, 25, 40])), EXACT)
    assert lost == pytest.approx(1 - (170 / 75) / (170 / 65))
    assert low == 0.0 < lost < high
