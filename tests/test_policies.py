"""Policies against hand-made confidences."""

from __future__ import annotations

import pytest
import torch

from dspark_serving.config import ServingConfig
from dspark_serving.scheduler.policies import FullPolicy, OffPolicy, ThresholdPolicy, make_policy

CONFIDENCE_RG = torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.2, 1.0], [0.1, 1.0, 1.0], [1.0, 1.0, 1.0]])


def test_full_verifies_every_position() -> None:
    assert FullPolicy().verify_lens(CONFIDENCE_RG).tolist() == [4, 4, 4, 4]


def test_off_verifies_the_anchor_only_and_needs_no_draft() -> None:
    assert OffPolicy().verify_lens(CONFIDENCE_RG).tolist() == [1, 1, 1, 1]
    assert not OffPolicy().drafts


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.0, [4, 4, 4, 4]), (0.5, [4, 2, 1, 4]), (0.75, [3, 2, 1, 4]), (1.0, [1, 1, 1, 4])],
)
def test_threshold_is_on_the_product_of_confidences(threshold: float, expected: list[int]) -> None:
    # A later confidence of 1 must not bring a position back once survival has fallen (third row).
    lens = ThresholdPolicy(threshold).verify_lens(CONFIDENCE_RG)
    assert lens.tolist() == expected
    assert lens.dtype == torch.int32


def test_threshold_is_causal() -> None:
    changed = CONFIDENCE_RG.clone()
    changed[:, 2] = 0.0
    before, after = (ThresholdPolicy(0.5).verify_lens(c) for c in (CONFIDENCE_RG, changed))
    assert torch.equal(before.clamp_max(3), after.clamp_max(3))


def test_make_policy_follows_the_options() -> None:
    assert [make_policy(ServingConfig(policy=name)).name for name in ("full", "threshold", "off")] == [
        "full",
        "threshold",
        "off",
    ]
    policy = make_policy(ServingConfig(policy="threshold", threshold=0.6))
    assert isinstance(policy, ThresholdPolicy)
    assert policy.threshold == 0.6
