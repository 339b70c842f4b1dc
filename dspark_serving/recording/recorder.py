"""Keeps the newest rounds of a running policy in bounded memory and writes them to a file on demand or on anomalies."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dspark_serving.recording.file import Recording, check_writable, describe, write_recording
from dspark_serving.recording.rounds import NEVER, Round, Snapshot
from dspark_serving.recording.state import capture
from dspark_serving.scheduler.catalog import PolicyParts
from dspark_serving.scheduler.round import Batch, Outcome, Plan, Policy, Terms
from dspark_serving.scheduler.survival import sanitise

logger = logging.getLogger(__name__)

_SNAPSHOTS = 4  # in the time that the ring spans: at least three quarters of it can be replayed
_IN_FLIGHT = 8  # rounds planned and not finished; two are usual under overlap
_ROUND_BYTES = 2048  # of the Python objects of a round, beside its arrays' contents
_REQUEST_BYTES = 48  # of the arrays' contents, confidences left out
_WRONG_FACTOR, _WRONG_ROUNDS = 3.0, 8  # an anomaly: so many rounds in a row off by this factor
_QUIET_SECONDS = 60.0  # between two files written because of anomalies
_MAX_FILES = 8  # written because of anomalies, by one process


class FlightRecorder:
    """A ring of rounds, bounded in number and bytes; `watch` puts it between the engine and a policy."""

    def __init__(
        self,
        directory: Path,
        *,
        rounds: int = 4096,
        max_bytes: int = 32 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Files go to `directory`, which is made when the first one is written."""
        self._directory = directory
        self._max_rounds = rounds
        self._max_bytes = max_bytes
        self._clock = clock
        self._files = 0
        self._quiet_until = -math.inf
        self._writer: threading.Thread | None = None
        self._dumps = 0

    def watch(self, policy: Policy, parts: PolicyParts) -> RecordedPolicy:
        """`policy`, recorded from now on; forgets the rounds of the policy before it."""
        self._name, self._parts, self._policy = policy.name, parts, policy
        self._ring: deque[tuple[Round, int]] = deque()
        self._bytes = 0
        self._snapshots: deque[Snapshot] = deque()
        self._since_snapshot = [0, 0]  # rounds, bytes
        self._lost = NEVER  # the moment that the last round to leave the ring was observed at
        self._wrong_rounds = 0
        self.moment = 0
        self._keep_snapshot()
        return RecordedPolicy(policy, self)

    @property
    def rounds(self) -> int:
        """In the ring."""
        return len(self._ring)

    @property
    def bytes(self) -> int:
        """Of the rounds in the ring, about; the few snapshots of the policy's state are not counted."""
        return self._bytes

    def tick(self) -> int:
        """The next moment."""
        self.moment += 1
        return self.moment

    def prepare(self) -> None:
        """Before the policy is asked about a round: keep what it knows, every quarter of the ring."""
        rounds, size = self._since_snapshot
        if rounds * _SNAPSHOTS >= self._max_rounds or size * _SNAPSHOTS >= self._max_bytes:
            self._keep_snapshot()

    def record(self, finished: Round) -> None:
        """Keep a round (its arrays are copied) and look for anomalies."""
        kept, size = _copy(finished)
        self._ring.append((kept, size))
        self._bytes += size
        self._since_snapshot[0] += 1
        self._since_snapshot[1] += size
        while len(self._ring) > self._max_rounds or (self._bytes > self._max_bytes and len(self._ring) > 1):
            gone, size = self._ring.popleft()
            self._bytes -= size
            self._lost = max(self._lost, gone.planned, gone.admitted, gone.observed)
        while len(self._snapshots) > 1 and self._snapshots[0].moment < self._lost:
            self._snapshots.popleft()
        if kept.observed != NEVER:
            self._look_for_anomalies(kept.outcome)

    def recording(self, reason: str) -> Recording:
        """What is in the ring now."""
        header = describe(self._name, self._parts, reason, lost=self._lost)
        return Recording(header, tuple(kept for kept, _ in self._ring), tuple(self._snapshots))

    def dump(self, path: Path | None = None) -> Path:
        """Write the ring to `path` (default: a new file in the directory) in a thread, and say where.

        Raises:
            OSError: nothing can be written there, or another file is being written.
        """
        if self._busy:
            raise OSError("another recording is being written")
        path = path or self._new_path()
        check_writable(path.parent)
        logger.info("recording of %d rounds on demand: %s", self.rounds, path)
        self._write(path, "on demand")
        return path

    def anomaly(self, reason: str) -> Path | None:
        """Write the ring in a thread, because something is wrong; None when there were files enough already."""
        now = self._clock()
        if self._busy or now < self._quiet_until or self._files >= _MAX_FILES:
            return None
        self._quiet_until = now + _QUIET_SECONDS
        self._files += 1
        path = self._new_path()
        logger.warning("anomaly: %s; the last %d rounds go to %s", reason, self.rounds, path)
        self._write(path, reason)
        return path

    def wait(self) -> None:
        """Until the last file is written."""
        if self._writer is not None:
            self._writer.join()

    @property
    def _busy(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _write(self, path: Path, reason: str) -> None:
        content = self.recording(reason)
        self._writer = threading.Thread(target=_write_or_warn, args=(path, content), name="dspark-recording")
        self._writer.start()

    def _new_path(self) -> Path:
        self._dumps += 1
        return self._directory / f"rounds-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{self._dumps}.npz"

    def _keep_snapshot(self) -> None:
        self._snapshots.append(Snapshot(self.moment, capture(policy=self._policy, cost=self._parts.cost)))
        self._since_snapshot = [0, 0]

    def _look_for_anomalies(self, outcome: Outcome) -> None:
        if outcome.confidence_RG is not None and sanitise(outcome.confidence_RG)[1]:
            self.anomaly("a confidence is no probability")
        expected = outcome.plan.expected_seconds
        if outcome.steady and expected > 0:
            right = expected / _WRONG_FACTOR < outcome.seconds < expected * _WRONG_FACTOR
            self._wrong_rounds = 0 if right else self._wrong_rounds + 1
            if self._wrong_rounds == _WRONG_ROUNDS:
                self._wrong_rounds = 0
                self.anomaly(f"a round took {outcome.seconds * 1e3:.1f} ms, {expected * 1e3:.1f} ms were expected")


class RecordedPolicy:
    """A policy that decides exactly like the one inside, and whose rounds are recorded."""

    def __init__(self, policy: Policy, recorder: FlightRecorder) -> None:
        self.policy = policy
        self.name = policy.name
        self._recorder = recorder
        self._open: deque[_Open] = deque()

    def plan(self, batch: Batch) -> Plan:
        """As the policy inside."""
        self._recorder.prepare()
        plan = self.policy.plan(batch)
        if len(self._open) == _IN_FLIGHT:
            self._give_up(self._open.popleft())
        self._open.append(_Open(batch, plan, self._recorder.tick()))
        return plan

    def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
        """As the policy inside."""
        verify_lens_R = self.policy.admit(batch, plan, confidence_RG)
        for entry in self._open:
            if entry.batch is batch:
                entry.confidence_RG, entry.admitted_R = confidence_RG, verify_lens_R
                entry.admitted = self._recorder.tick()
        return verify_lens_R

    def terms(self, batch: Batch) -> Terms | None:
        """As the policy inside."""
        return self.policy.terms(batch)

    def observe(self, outcome: Outcome) -> None:
        """As the policy inside; `outcome.batch` has to be the object that the round was planned with."""
        self.policy.observe(outcome)
        moment = self._recorder.tick()
        entry = None
        if any(entry.batch is outcome.batch for entry in self._open):
            while (entry := self._open.popleft()).batch is not outcome.batch:
                self._give_up(entry)
        if entry is None:
            self._recorder.record(Round(outcome, None, NEVER, NEVER, moment))
        else:
            self._recorder.record(Round(outcome, entry.admitted_R, entry.planned, entry.admitted, moment))

    def _give_up(self, entry: _Open) -> None:
        """Rounds finish in the order of their plans: this one never will, but asking about it may have taught."""
        requests = entry.batch.requests
        verify_lens_R = np.ones(requests, dtype=np.int32) if entry.admitted_R is None else entry.admitted_R
        nothing_R = np.zeros(requests, dtype=np.int32)
        made_up = Outcome(
            entry.batch, entry.plan, entry.confidence_RG, verify_lens_R, nothing_R, math.nan, math.nan, steady=False
        )
        self._recorder.record(Round(made_up, entry.admitted_R, entry.planned, entry.admitted, NEVER))


class _Open:
    """A round that was planned and is not finished."""

    __slots__ = ("admitted", "admitted_R", "batch", "confidence_RG", "plan", "planned")

    def __init__(self, batch: Batch, plan: Plan, planned: int) -> None:
        self.batch = batch
        self.plan = plan
        self.planned = planned
        self.admitted = NEVER
        self.admitted_R: np.ndarray | None = None
        self.confidence_RG: np.ndarray | None = None


def _copy(finished: Round) -> tuple[Round, int]:
    """The round with arrays of its own, and its size in bytes."""
    batch, plan, confidence_RG, verify_lens_R, accepted_R, draft_seconds, seconds, steady = finished.outcome
    admitted_R = finished.admitted_R
    own = Outcome(
        Batch(*[field_R.copy() for field_R in batch]),
        plan,
        None if confidence_RG is None else confidence_RG.copy(),
        verify_lens_R.copy(),
        accepted_R.copy(),
        draft_seconds,
        seconds,
        steady,
    )
    size = _ROUND_BYTES + _REQUEST_BYTES * len(accepted_R) + (0 if confidence_RG is None else confidence_RG.nbytes)
    kept = Round(own, None if admitted_R is None else admitted_R.copy(), *finished[2:])
    return kept, size


def _write_or_warn(path: Path, content: Recording) -> None:
    try:
        write_recording(path, content)
    except OSError as error:
        logger.warning("the recording %s could not be written: %s", path, error)
