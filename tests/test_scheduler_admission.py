"""Admission and the capacity curve against plain enumeration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dspark_serving.scheduler.admission import admit, candidate_totals, gain_curve, values

LEVELS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
"""Few levels: many ties."""


def blocks(max_requests: int = 5, max_gamma: int = 4) -> st.SearchStrategy[np.ndarray]:
    shape = st.tuples(st.integers(1, max_requests), st.integers(1, max_gamma))
    return hnp.arrays(np.float32, shape, elements=LEVELS)


def admit_one_by_one(confidence_RG: np.ndarray, weight_R: np.ndarray, price: float, capacity: int) -> list[int]:
    """The rule as it is worded: sort the pairs that pay by (value desc, position, request), take the first ones."""
    requests, gamma = confidence_RG.shape
    pairs = []
    for r in range(requests):
        value = np.float32(weight_R[r])
        for k in range(gamma):
            value = value * confidence_RG[r, k]
            if value >= price:
                pairs.append((-float(value), k, r))
    taken = {(r, k) for _, k, r in sorted(pairs)[:capacity]}
    return [1 + sum((r, k) in taken for k in range(gamma)) for r in range(requests)]


@settings(max_examples=300, deadline=None)
@given(
    confidence_RG=blocks(),
    price=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 2.0]),
    capacity=st.integers(0, 24),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=5, max_size=5),
)
def test_admission_is_the_rule_as_worded(
    confidence_RG: np.ndarray, price: float, capacity: int, weights: list[float]
) -> None:
    weight_R = np.array(weights[: len(confidence_RG)], dtype=np.float32)
    lens_R = admit(values(confidence_RG, weight_R), price, capacity)
    assert lens_R.dtype == np.int32
    assert lens_R.tolist() == admit_one_by_one(confidence_RG, weight_R, price, capacity)


def test_the_pairs_counted_by_the_oracle_are_prefixes() -> None:
    # The oracle above counts pairs; this shows on one hand-made case that they are the leading ones.
    value_GR = values(np.array([[1.0, 1.0, 0.5], [1.0, 0.5, 1.0]], dtype=np.float32))
    assert admit(value_GR, 0.0, 1).tolist() == [2, 1]  # position 1 of both is worth 1: the lower request first
    assert admit(value_GR, 0.0, 2).tolist() == [2, 2]  # ... and before position 2 of request 0, worth 1 as well
    assert admit(value_GR, 0.0, 3).tolist() == [3, 2]
    assert admit(value_GR, 0.0, 4).tolist() == [3, 3]  # three pairs worth 0.5: position 2 before position 3


def test_a_price_cuts_where_survival_falls_below_it() -> None:
    confidence_RG = np.array([[0.9, 0.9, 0.9], [0.9, 0.2, 1.0], [0.1, 1.0, 1.0]], dtype=np.float32)
    assert admit(values(confidence_RG), 0.5, 9).tolist() == [4, 2, 1]


def test_weights_scale_what_a_position_is_worth() -> None:
    confidence_RG = np.full((2, 3), 0.5, dtype=np.float32)
    weight_R = np.array([1.0, 4.0], dtype=np.float32)
    assert admit(values(confidence_RG, weight_R), 0.5, 6).tolist() == [2, 4]


def test_no_request() -> None:
    lens_R = admit(values(np.zeros((0, 7), dtype=np.float32)), 0.5, 3)
    assert lens_R.shape == (0,)


@settings(max_examples=200, deadline=None)
@given(value=hnp.arrays(np.float32, st.integers(1, 40), elements=LEVELS), data=st.data())
def test_gain_curve_sums_the_largest(value: np.ndarray, data: st.DataObject) -> None:
    take = data.draw(st.lists(st.integers(0, value.size), min_size=1, max_size=6, unique=True).map(sorted))
    expected = [np.sort(value)[::-1][:n].sum(dtype=np.float64) for n in take]
    assert gain_curve(np.sort(value))[np.array(take)] == pytest.approx(expected)


def test_totals_are_the_ends_of_tiers_that_hold_every_anchor() -> None:
    total_N, drafts_N, step_M = candidate_totals(3, 7, (1, 2, 4, 8, 16, 32, 64))
    assert total_N.tolist() == [4, 8, 16, 24]  # 3 * 8 = 24 tokens fill no more of the tier of 32
    assert drafts_N.tolist() == [1, 5, 13, 21]
    assert step_M.tolist() == [4, 8, 8]
    assert candidate_totals(100, 7, (64,)).total_N.tolist() == [800]  # beyond every tier: no choice


def test_totals_without_tiers_span_nothing_to_everything() -> None:
    assert candidate_totals(1, 7, None).total_N.tolist() == list(range(1, 9))
    total_N, drafts_N, _ = candidate_totals(256, 7, None)
    assert (total_N[0], total_N[-1], len(total_N)) == (256, 2048, 24)
    assert (np.diff(drafts_N) > 0).all()
