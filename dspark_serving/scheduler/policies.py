"""Policies: from the drafter's confidences to verify lengths.

A verify length counts the anchor: 1 verifies no drafted token, gamma + 1 all of them. Every policy is causal: whether
position k is verified depends on the confidences of positions <= k only, and those do not see x_k itself, so the text
keeps the target's distribution.
"""

from __future__ import annotations

from typing import Protocol

import torch

from dspark_serving.config import ServingConfig


class Policy(Protocol):
    """One decision a round for the whole batch."""

    name: str
    drafts: bool
    """Whether the round needs a draft pass at all."""

    def verify_lens(self, confidence_RG: torch.Tensor) -> torch.Tensor:
        """Verify lengths [R] int32 in 1..G+1, from confidences [R, G] in [0, 1]."""
        ...


class FullPolicy:
    """Verify every drafted token."""

    name = "full"
    drafts = True

    def verify_lens(self, confidence_RG: torch.Tensor) -> torch.Tensor:
        requests, gamma = confidence_RG.shape
        return torch.full((requests,), gamma + 1, dtype=torch.int32, device=confidence_RG.device)


class ThresholdPolicy:
    """Verify a position while the probability that the draft survives up to and including it is high enough.

    Survival a_k = c_1 * ... * c_k (DSpark paper, section 4) falls along the block, so the verified part is a prefix.
    """

    name = "threshold"
    drafts = True

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def verify_lens(self, confidence_RG: torch.Tensor) -> torch.Tensor:
        survival_RG = confidence_RG.float().cumprod(dim=1)
        return 1 + (survival_RG >= self.threshold).sum(dim=1, dtype=torch.int32)


class OffPolicy:
    """Verify the anchor only, without a draft pass: a plain decoding step that keeps the drafter's context current."""

    name = "off"
    drafts = False

    def verify_lens(self, confidence_RG: torch.Tensor) -> torch.Tensor:
        return torch.ones(confidence_RG.shape[0], dtype=torch.int32, device=confidence_RG.device)


def make_policy(config: ServingConfig) -> Policy:
    """The policy that the options name."""
    if config.policy == "threshold":
        return ThresholdPolicy(config.threshold)
    return OffPolicy() if config.policy == "off" else FullPolicy()
