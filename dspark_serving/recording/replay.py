"""Asks a policy again about recorded rounds: the same one, to reproduce its decisions, or another, to compare."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dspark_serving.errors import DataError
from dspark_serving.recording.file import Recording
from dspark_serving.recording.rounds import NEVER, Round
from dspark_serving.recording.state import reinstate
from dspark_serving.scheduler.catalog import POLICIES, PolicyParts, make_policy
from dspark_serving.scheduler.cost import CostModel
from dspark_serving.scheduler.recalibration import OnlineCalibration
from dspark_serving.scheduler.round import Batch, Outcome, Plan, Policy
from dspark_serving.scheduler.survival import calibrated


class Difference(NamedTuple):
    """The first decision that did not come out as recorded."""

    round: int  # index in the recording
    what: str  # a field of the plan, or "verify_lens_R"
    recorded: str
    replayed: str


class ReplayReport(NamedTuple):
    """What was reproduced."""

    rounds: int  # in the recording
    plans: int  # compared
    admissions: int  # compared; fewer than plans where the device admitted, or nothing was drafted
    difference: Difference | None


def replay(recording: Recording, policy: Policy | None = None, parts: PolicyParts | None = None) -> ReplayReport:
    """Reproduce every decision since the first snapshot that can be continued, bit for bit, up to the first difference.

    Bits can differ on another processor or numpy, whose exponentials round differently: the header names both.

    Args:
        policy: newly made, of the recorded kind; default: by the recorded name.
        parts: what `policy` was made of.

    Raises:
        DataError: the recording holds no snapshot from which all later rounds are known.
    """
    parts = parts or recording.header.parts()
    policy = policy or make_policy(recording.header.policy, parts)
    start = _start(recording, policy, parts)
    plans: dict[int, Plan] = {}
    admissions = 0
    for moment, what, index in _events(recording.rounds):
        if moment <= start:
            continue
        kept = recording.rounds[index]
        if what == "plan":
            plans[index] = policy.plan(kept.outcome.batch)
            difference = _plan_difference(index, kept.outcome.plan, plans[index])
        elif what == "admit":
            plan = plans.get(index, kept.outcome.plan)
            lens_R = policy.admit(kept.outcome.batch, plan, _needed(kept.outcome.confidence_RG, index))
            admissions += 1
            difference = _lens_difference(index, _needed(kept.admitted_R, index), lens_R)
        else:
            policy.observe(kept.outcome)
            continue
        if difference is not None:
            return ReplayReport(len(recording.rounds), len(plans), admissions, difference)
    return ReplayReport(len(recording.rounds), len(plans), admissions, None)


class Tally(NamedTuple):
    """What a policy's decisions come to.

    A draft has a label only up to where it was verified; what lies beyond is estimated by calibrated survival.
    """

    rounds: int = 0
    verified: int = 0  # drafted tokens
    accepted: int = 0  # drafted tokens known to be accepted
    estimated: float = 0.0  # drafted tokens beyond the recorded verification, accepted by estimate
    bonus: int = 0  # tokens of the target: one for each request and round
    seconds: float = 0.0  # predicted by the cost model; nan without cost data

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens over predicted seconds."""
        return (self.accepted + self.estimated + self.bonus) / self.seconds if self.seconds > 0 else math.nan

    def plus(self, outcome: Outcome, lens_R: np.ndarray, beyond: float, seconds: float) -> Tally:
        """With a round more, in which `lens_R` were verified."""
        return Tally(
            self.rounds + 1,
            self.verified + int((lens_R - 1).sum()),
            self.accepted + int(np.minimum(outcome.accepted_R, lens_R - 1).sum()),
            self.estimated + beyond,
            self.bonus + outcome.batch.requests,
            self.seconds + seconds,
        )


class WhatIf(NamedTuple):
    """The recorded decisions and another policy's, over the same rounds."""

    recorded: Tally
    other: Tally
    unknown_rounds: int  # left out: the policy would have drafted where the server did not


def what_if(recording: Recording, name: str, threshold: float | None = None) -> WhatIf:
    """The decisions of another policy, that starts with what the recording knew of costs and without own experience.

    It learns from what is known: positions beyond the recorded verification are no labels for it, nor are predicted
    seconds measured ones.

    Raises:
        OptionError: no policy has this name.
    """
    cost, calibration = _learned(recording)
    parts = recording.header.parts()._replace(cost=cost)
    policy = make_policy(name, parts if threshold is None else parts._replace(threshold=threshold))
    recorded, other, unknown_rounds = Tally(), Tally(), 0
    for outcome in (kept.outcome for kept in recording.rounds if kept.observed != NEVER):
        batch, confidence_RG = outcome.batch, outcome.confidence_RG
        plan = policy.plan(batch)
        if plan.drafts and confidence_RG is None:
            unknown_rounds += 1
            continue
        lens_R, beyond = np.ones_like(outcome.verify_lens_R), 0.0
        if plan.drafts and confidence_RG is not None:
            lens_R = policy.admit(batch, plan, confidence_RG)
            calibrated_RG, _ = calibrated(confidence_RG, batch.temperature_R, calibration.apply)
            beyond = _beyond(outcome, lens_R, calibrated_RG)
        was_seconds = _seconds(cost, batch, outcome.verify_lens_R, drafted=confidence_RG is not None)
        recorded = recorded.plus(outcome, outcome.verify_lens_R, 0.0, was_seconds)
        other = other.plus(outcome, lens_R, beyond, _seconds(cost, batch, lens_R, drafted=plan.drafts))
        policy.observe(_as_far_as_known(outcome, plan, lens_R))
    return WhatIf(recorded, other, unknown_rounds)


def _as_far_as_known(outcome: Outcome, plan: Plan, lens_R: np.ndarray) -> Outcome:
    known_R = np.minimum(lens_R, outcome.verify_lens_R)
    return outcome._replace(
        plan=plan,
        confidence_RG=outcome.confidence_RG if plan.drafts else None,
        verify_lens_R=known_R,
        accepted_R=np.minimum(outcome.accepted_R, known_R - 1),
        steady=False,
    )


def _beyond(outcome: Outcome, lens_R: np.ndarray, calibrated_RG: np.ndarray) -> float:
    """Expected accepted drafts at positions that were not verified, where everything verified was accepted."""
    position_G = np.arange(1, calibrated_RG.shape[1] + 1)
    verified_R = outcome.verify_lens_R - 1
    open_RG = (position_G > verified_R[:, None]) & (outcome.accepted_R == verified_R)[:, None]
    survival_RG = np.where(open_RG, calibrated_RG, 1.0).cumprod(axis=1)
    return float(survival_RG[open_RG & (position_G < lens_R[:, None])].sum())


def _seconds(cost: CostModel, batch: Batch, lens_R: np.ndarray, *, drafted: bool) -> float:
    return cost.seconds(batch.requests, int(lens_R.sum()), int(batch.context_R.sum()), drafted, batch.sampled)


def _learned(recording: Recording) -> tuple[CostModel, OnlineCalibration]:
    """What the server knew at the last snapshot; at its start if it ran a policy from outside the catalog."""
    parts = recording.header.parts()
    calibration = OnlineCalibration(parts.calibration)
    if recording.snapshots and recording.header.policy in POLICIES:
        policy = make_policy(recording.header.policy, parts, calibration)
        reinstate(recording.snapshots[-1].state, policy=policy, cost=parts.cost)
    return parts.cost, calibration


def _start(recording: Recording, policy: Policy, parts: PolicyParts) -> int:
    """Put the policy where it was at the earliest snapshot after which no round is missing; its moment."""
    for snapshot in recording.snapshots:
        if snapshot.moment >= recording.header.lost:
            reinstate(snapshot.state, policy=policy, cost=parts.cost)
            return snapshot.moment
    raise DataError(
        "the recording cannot be continued from any of its snapshots",
        expected="all rounds since a snapshot",
        fix="Record with room for more rounds.",
    )


def _events(rounds: tuple[Round, ...]) -> Iterator[tuple[int, str, int]]:
    """(moment, question, index of the round), in the order in which the policy was asked."""
    events = []
    for index, kept in enumerate(rounds):
        for what, moment in (("plan", kept.planned), ("admit", kept.admitted), ("observe", kept.observed)):
            if moment != NEVER:
                events.append((moment, what, index))
    return iter(sorted(events))


def _needed(array: np.ndarray | None, index: int) -> np.ndarray:
    if array is None:
        raise DataError(f"round {index} was admitted without confidences", expected="both or none", fix="Record again.")
    return array


def _plan_difference(index: int, recorded: Plan, replayed: Plan) -> Difference | None:
    for name, was, now in zip(Plan._fields, recorded, replayed, strict=True):
        if was != now and not (was != was and now != now):  # nan equals nan here
            return Difference(index, name, repr(was), repr(now))
    return None


def _lens_difference(index: int, recorded_R: np.ndarray, replayed_R: np.ndarray) -> Difference | None:
    if np.array_equal(recorded_R, replayed_R):
        return None
    return Difference(index, "verify_lens_R", str(recorded_R.tolist()), str(replayed_R.tolist()))
