"""What a policy is told of a round and what it answers: the hand-overs between the engine and the scheduler.

Shapes: R requests, G = gamma drafted tokens a block. A verify length counts the anchor: 1 verifies no drafted token,
G + 1 all of them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Batch(NamedTuple):
    """The running requests, before anything of this round is drafted."""

    slots_R: np.ndarray  # int64: row of each request in the engine's pool, 0 <= slot < slots
    generations_R: np.ndarray  # int64: changes when a slot is given to another request
    context_R: np.ndarray  # int64: committed tokens
    temperature_R: np.ndarray  # float32: 0 is greedy
    weight_R: np.ndarray  # float32 > 0: value of a token of this request, 1 for an ordinary one
    floor_R: np.ndarray  # float32: tokens a second that the request should get at least, 0 for none

    @property
    def requests(self) -> int:
        """R."""
        return len(self.slots_R)

    @property
    def sampled(self) -> int:
        """Requests that are not greedy."""
        return int(np.count_nonzero(self.temperature_R))

    @classmethod
    def ordinary(cls, slots_R: np.ndarray, context_R: np.ndarray, generations_R: np.ndarray | None = None) -> Batch:
        """Greedy requests of equal weight without floors."""
        requests = len(slots_R)
        generations_R = np.zeros(requests, dtype=np.int64) if generations_R is None else generations_R
        ones_R, zeros_R = np.ones(requests, dtype=np.float32), np.zeros(requests, dtype=np.float32)
        return cls(slots_R, generations_R, context_R, zeros_R, ones_R, zeros_R)


class Plan(NamedTuple):
    """Decided from earlier rounds only, so it is known before this round's drafts are."""

    drafts: bool  # False: no draft pass, a plain decoding step
    price: float  # weight * survival that a position must reach to be verified; 0 admits every position
    capacity: int  # drafted tokens verified at most, over the whole batch
    reason: str  # why, in a word or two: a label of the metrics
    expected_tokens: float  # over the batch, bonus tokens included; nan when nothing is known
    expected_seconds: float  # of the whole round; nan when nothing is known


class Terms(NamedTuple):
    """What a policy ranks by, beside price and capacity, where the confidences stay on the accelerator."""

    weight_R: np.ndarray  # float32, finite: value of a token of each request
    line_2BG: np.ndarray  # float32: factor and addend of raw logits by temperature band and position


class Outcome(NamedTuple):
    """What became of a round."""

    batch: Batch
    plan: Plan
    confidence_RG: np.ndarray | None  # of the confidence head, or estimated; None when nothing was drafted
    verify_lens_R: np.ndarray  # int32
    accepted_R: np.ndarray  # int32: accepted drafts, without the bonus token
    draft_seconds: float
    seconds: float  # of the whole round, draft pass included
    steady: bool  # False after a prefill or an idle moment: `seconds` is no sample of a round's time


class Policy(Protocol):
    """Plans every round in two steps: the amount from old information, the choice from this round's confidences."""

    name: str

    def plan(self, batch: Batch) -> Plan:
        """Decide, before anything is drafted, whether to draft, at what price and up to which capacity."""
        ...

    def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
        """Verify lengths [R] int32 in 1..G+1, from confidences [R, G] (probabilities of surviving, given the prefix).

        Causal: whether position k is verified depends on nothing that is known only from x_k on.
        """
        ...

    def terms(self, batch: Batch) -> Terms | None:
        """What `admit` goes by, for admission on the accelerator; None where the plan and this do not say it all."""
        ...

    def observe(self, outcome: Outcome) -> None:
        """Learn from a finished round."""
        ...
