"""A recording as one compressed .npz file: flat arrays over rounds and requests, and a header in JSON; no pickle.

The rounds' requests follow each other in arrays [N]; confidences [M, G] only of rounds that have them.
"""

from __future__ import annotations

import os
import platform
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dspark_serving import __version__
from dspark_serving.errors import DataError
from dspark_serving.recording.rounds import Round, Snapshot
from dspark_serving.recording.state import State
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.catalog import PolicyParts
from dspark_serving.scheduler.cost import CostModel, CostSample
from dspark_serving.scheduler.round import Batch, Outcome, Plan

_FIX = "Record again; a recording is written by `dspark-serving` itself."

# Per request, as `Batch` and `Outcome` declare them; then per round.
_REQUEST_FIELDS: dict[str, type[np.generic]] = {
    "slots": np.int64, "generations": np.int64, "context": np.int64, "temperature": np.float32, "weight": np.float32,
    "floor": np.float32, "verify_lens": np.int32, "accepted": np.int32, "asked_lens": np.int32,
}  # fmt: skip
_ROUND_FIELDS: dict[str, type[np.generic]] = {
    "requests": np.int64, "drafts": np.bool_, "price": np.float64, "capacity": np.int64, "reason": np.int64,
    "expected_tokens": np.float64, "expected_seconds": np.float64, "draft_seconds": np.float64, "seconds": np.float64,
    "steady": np.bool_, "has_confidence": np.bool_, "has_lens": np.bool_, "planned": np.int64, "admitted": np.int64,
    "observed": np.int64,
}  # fmt: skip


class _SnapshotHeader(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    moment: int
    plain: dict[str, Any]


class Header(BaseModel):
    """What the rounds were recorded from."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format: Literal["dspark-recording"] = "dspark-recording"
    version: Literal[1] = 1
    policy: str
    reason: str = Field(description="why the file was written")
    gamma: int = Field(ge=1)
    slots: int = Field(ge=1)
    threshold: float
    speed_floor: float
    temperatures: tuple[float, ...]
    cost_samples: tuple[CostSample, ...]
    cost_tiers: tuple[int, ...] | None
    lost: int = Field(description="the last moment of a round that is not in the file any more")
    plugin: str
    numpy: str
    machine: str
    reasons: tuple[str, ...] = Field((), description="of plans; rounds refer to them by index")
    snapshots: tuple[_SnapshotHeader, ...] = ()

    def parts(self) -> PolicyParts:
        """What the policy was made of, as it was before any round."""
        known = bool(self.cost_samples)
        cost = CostModel.fit(self.cost_samples, self.cost_tiers) if known else CostModel.unknown()
        calibration = Calibration(self.temperatures)
        return PolicyParts(self.gamma, self.slots, cost, calibration, self.threshold, self.speed_floor)


class Recording(NamedTuple):
    """A stretch of rounds, in the order in which they were finished."""

    header: Header
    rounds: tuple[Round, ...]
    snapshots: tuple[Snapshot, ...]  # by moment


def describe(policy: str, parts: PolicyParts, reason: str, *, lost: int) -> Header:
    """The header of a recording made now."""
    return Header(
        policy=policy,
        reason=reason,
        gamma=parts.gamma,
        slots=parts.slots,
        threshold=parts.threshold,
        speed_floor=parts.speed_floor,
        temperatures=parts.calibration.temperatures_G,
        cost_samples=parts.cost.samples,
        cost_tiers=parts.cost.tiers,
        lost=lost,
        plugin=__version__,
        numpy=np.__version__,
        machine=platform.machine(),
    )


def check_writable(directory: Path) -> None:
    """Raise OSError where no file can be made; the directory is made if it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def write_recording(path: Path, recording: Recording) -> None:
    """Write a file that `read_recording` reads; it appears under its name when it is complete.

    Raises:
        OSError: it cannot be written.
    """
    reasons = sorted({kept.outcome.plan.reason for kept in recording.rounds})
    snapshots = tuple(_SnapshotHeader(moment=s.moment, plain=s.state.plain) for s in recording.snapshots)
    header = recording.header.model_copy(update={"reasons": tuple(reasons), "snapshots": snapshots})
    arrays: dict[str, np.ndarray] = {"header": np.frombuffer(header.model_dump_json().encode(), dtype=np.uint8)}
    per_round = [_round_values(kept, reasons) for kept in recording.rounds]
    for column, (name, kind) in enumerate(_ROUND_FIELDS.items()):
        arrays[f"round.{name}"] = np.array([values[column] for values in per_round], dtype=kind)
    per_request = [_request_values(kept) for kept in recording.rounds]
    for column, (name, kind) in enumerate(_REQUEST_FIELDS.items()):
        columns = [np.zeros(0, kind), *(values[column] for values in per_request)]
        arrays[f"request.{name}"] = np.concatenate(columns, dtype=kind, casting="same_kind")
    confidences = [k.outcome.confidence_RG for k in recording.rounds if k.outcome.confidence_RG is not None]
    arrays["confidence"] = np.concatenate(
        [np.zeros((0, header.gamma)), *confidences], dtype=np.float32, casting="same_kind"
    )
    for index, snapshot in enumerate(recording.snapshots):
        arrays.update({f"snapshot.{index}.{name}": array for name, array in snapshot.state.arrays.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    os.replace(partial, path)


def read_recording(path: Path) -> Recording:
    """The recording in a file.

    Raises:
        DataError: the file is missing, damaged, of another version, or no recording.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        header = Header.model_validate_json(arrays.pop("header").tobytes())
        return _assemble(header, arrays)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, KeyError, ValueError) as error:
        reason = (
            f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}" if isinstance(error, ValidationError) else error
        )
        raise DataError(f"{path} cannot be read ({reason})", expected="a recording of version 1", fix=_FIX) from error


def _round_values(kept: Round, reasons: list[str]) -> tuple[Any, ...]:
    outcome, plan = kept.outcome, kept.outcome.plan
    moments = (kept.planned, kept.admitted, kept.observed)
    planned = (plan.drafts, plan.price, plan.capacity, reasons.index(plan.reason))
    expected = (plan.expected_tokens, plan.expected_seconds)
    measured = (outcome.draft_seconds, outcome.seconds, outcome.steady)
    has = (outcome.confidence_RG is not None, kept.admitted_R is not None)
    return (outcome.batch.requests, *planned, *expected, *measured, *has, *moments)


def _request_values(kept: Round) -> tuple[np.ndarray, ...]:
    outcome = kept.outcome
    asked_R = np.zeros(outcome.batch.requests, dtype=np.int32) if kept.admitted_R is None else kept.admitted_R
    return (*outcome.batch, outcome.verify_lens_R, outcome.accepted_R, asked_R)


def _assemble(header: Header, arrays: Mapping[str, np.ndarray]) -> Recording:
    """Rounds and snapshots from arrays; a ValueError or KeyError says what does not fit."""
    per_round = [_checked(arrays, f"round.{name}", kind) for name, kind in _ROUND_FIELDS.items()]
    per_request = [_checked(arrays, f"request.{name}", kind) for name, kind in _REQUEST_FIELDS.items()]
    confidence = _checked(arrays, "confidence", np.float32, columns=header.gamma)
    columns = dict(zip(_ROUND_FIELDS, per_round, strict=True))
    requests_N = columns["requests"]
    totals = {len(column) for column in per_request} | {int(requests_N.sum())}
    if len({len(column) for column in per_round}) != 1 or len(totals) != 1 or (requests_N < 0).any():
        raise ValueError("arrays of different lengths")
    if int(requests_N[columns["has_confidence"]].sum()) != len(confidence):
        raise ValueError("confidences and rounds disagree")
    _check_values(header, dict(zip(_REQUEST_FIELDS, per_request, strict=True)))
    ends = np.cumsum(requests_N)
    confidence_ends = np.cumsum(requests_N * columns["has_confidence"])
    rounds = []
    for index, values in enumerate(zip(*(column.tolist() for column in per_round), strict=True)):
        rows = slice(int(ends[index]) - values[0], int(ends[index]))
        confidence_rows = slice(int(confidence_ends[index]) - values[0], int(confidence_ends[index]))
        rounds.append(_round(header, values, [column[rows] for column in per_request], confidence[confidence_rows]))
    snapshots = []
    for index, found in enumerate(header.snapshots):
        prefix = f"snapshot.{index}."
        state = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        snapshots.append(Snapshot(found.moment, State(state, found.plain)))
    return Recording(header, tuple(rounds), tuple(snapshots))


def _checked(
    arrays: Mapping[str, np.ndarray], name: str, kind: type[np.generic], columns: int | None = None
) -> np.ndarray:
    array = arrays[name]
    shape = (len(array),) if columns is None else (len(array), columns)
    if array.dtype != kind or array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape} and type {array.dtype}")
    return array


def _check_values(header: Header, requests: Mapping[str, np.ndarray]) -> None:
    lens_N, accepted_N, slots_N = requests["verify_lens"], requests["accepted"], requests["slots"]
    if (
        (lens_N < 1).any()
        or (lens_N > header.gamma + 1).any()
        or (accepted_N < 0).any()
        or (accepted_N > header.gamma).any()
    ):
        raise ValueError(f"verify lengths or accepted drafts beyond a block of {header.gamma}")
    if (slots_N < 0).any() or (slots_N >= header.slots).any():
        raise ValueError("slots that the engine does not have")


def _round(header: Header, values: tuple[Any, ...], requests: list[np.ndarray], confidence_RG: np.ndarray) -> Round:
    of = dict(zip(_ROUND_FIELDS, values, strict=True))
    if not 0 <= of["reason"] < len(header.reasons):
        raise ValueError("a plan without its reason")
    *batch, verify_lens_R, accepted_R, asked_R = requests
    reason = header.reasons[of["reason"]]
    plan = Plan(of["drafts"], of["price"], of["capacity"], reason, of["expected_tokens"], of["expected_seconds"])
    confidence = confidence_RG if of["has_confidence"] else None
    outcome = Outcome(
        Batch(*batch), plan, confidence, verify_lens_R, accepted_R, of["draft_seconds"], of["seconds"], of["steady"]
    )
    return Round(outcome, asked_R if of["has_lens"] else None, of["planned"], of["admitted"], of["observed"])
