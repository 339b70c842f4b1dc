"""The flight recorder: bounded, faithful, and replayed to the bit."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dspark_serving.errors import DataError
from dspark_serving.recording import FlightRecorder, Recording, read_recording, replay, write_recording
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.catalog import POLICIES, make_policy
from dspark_serving.scheduler.cost import CostModel
from dspark_serving.scheduler.round import Batch, Outcome, Plan
from tests.recorded import GAMMA, new_parts, run


def record(tmp_path: Path, name: str = "adaptive", count: int = 300, *, lag: int = 0, ring: int = 4096) -> Recording:
    recorder = FlightRecorder(tmp_path, rounds=ring)
    parts = new_parts(Calibration((1.2, 0.9, 1.1, 1.0)))
    run(recorder.watch(make_policy(name, parts), parts), count, lag=lag)
    return written(recorder, tmp_path / f"{name}.npz")


def written(recorder: FlightRecorder, path: Path | None = None) -> Recording:
    found = recorder.dump(path)
    recorder.wait()
    return read_recording(found)


def test_a_file_gives_back_every_round_as_it_was(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path)
    parts = new_parts()
    outcomes = run(recorder.watch(make_policy("adaptive", parts), parts), 50)
    read = written(recorder, tmp_path / "deep" / "file.npz")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.npz"]
    assert len(read.rounds) == 50
    for kept, outcome in zip(read.rounds, outcomes, strict=True):
        for was, now in zip(outcome.batch, kept.outcome.batch, strict=True):
            np.testing.assert_array_equal(was, now)
        assert kept.outcome.plan == outcome.plan
        assert (kept.outcome.confidence_RG is None) == (outcome.confidence_RG is None)
        if outcome.confidence_RG is not None and kept.outcome.confidence_RG is not None:
            np.testing.assert_array_equal(kept.outcome.confidence_RG, outcome.confidence_RG)
        np.testing.assert_array_equal(kept.outcome.verify_lens_R, outcome.verify_lens_R)
        np.testing.assert_array_equal(kept.outcome.accepted_R, outcome.accepted_R)
        assert kept.outcome[5:] == outcome[5:]


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("name", POLICIES)
def test_every_decision_is_reproduced(tmp_path: Path, name: str, lag: int) -> None:
    recording = record(tmp_path, name, lag=lag)
    report = replay(recording)
    assert report.difference is None
    assert report.plans == report.rounds == 300
    drafted = sum(kept.outcome.plan.drafts for kept in recording.rounds)
    assert report.admissions == drafted
    assert (drafted == 0) == (name == "off")


@pytest.mark.parametrize("lag", [0, 2])
def test_a_ring_that_has_gone_round_is_reproduced_from_a_later_snapshot(tmp_path: Path, lag: int) -> None:
    recording = record(tmp_path, count=700, lag=lag, ring=100)
    report = replay(recording)
    assert report.difference is None
    assert report.rounds == 100
    assert report.plans >= 70


def test_the_order_of_questions_matters_to_the_replay(tmp_path: Path) -> None:
    # Negative control of the lag: with each round observed before the next is planned, decisions come out differently.
    recording = record(tmp_path, lag=2)
    moments = [(3 * index + 1, 3 * index + 2, 3 * index + 3) for index in range(len(recording.rounds))]
    in_turn = tuple(
        kept._replace(planned=plan, admitted=admit if kept.admitted_R is not None else -1, observed=observe)
        for kept, (plan, admit, observe) in zip(recording.rounds, moments, strict=True)
    )
    assert replay(recording._replace(rounds=in_turn)).difference is not None


@pytest.mark.parametrize("what", ["price", "capacity", "verify_lens_R"])
def test_a_changed_decision_is_found(tmp_path: Path, what: str) -> None:
    recording = record(tmp_path)
    index = next(i for i in range(200, 300) if recording.rounds[i].admitted_R is not None)
    kept = recording.rounds[index]
    if what == "verify_lens_R":
        changed_R = kept.admitted_R.copy()  # type: ignore[union-attr]
        changed_R[-1] = changed_R[-1] % (GAMMA + 1) + 1
        kept = kept._replace(admitted_R=changed_R)
    else:
        plan = kept.outcome.plan
        plan = plan._replace(price=plan.price + 1e-12) if what == "price" else plan._replace(capacity=plan.capacity + 1)
        kept = kept._replace(outcome=kept.outcome._replace(plan=plan))
    tampered = recording._replace(rounds=(*recording.rounds[:index], kept, *recording.rounds[index + 1 :]))
    write_recording(tmp_path / "tampered.npz", tampered)
    difference = replay(read_recording(tmp_path / "tampered.npz")).difference
    assert difference is not None
    assert (difference.round, difference.what) == (index, what)


def test_changed_evidence_changes_later_decisions(tmp_path: Path) -> None:
    recording = record(tmp_path)
    slow = recording.rounds[50].outcome._replace(seconds=10.0, steady=True)
    rounds = (*recording.rounds[:50], recording.rounds[50]._replace(outcome=slow), *recording.rounds[51:])
    difference = replay(recording._replace(rounds=rounds)).difference
    assert difference is not None
    assert difference.round > 50


def test_rounds_given_up_in_flight_are_replayed_too(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path)
    parts = new_parts()
    policy = recorder.watch(make_policy("adaptive", parts), parts)
    run(policy, 100)
    for _ in range(40):  # planned, and their results never come
        policy.plan(Batch.ordinary(np.array([1, 2]), np.array([10, 10])))
    run(policy, 100, seed=1)
    report = replay(written(recorder))
    assert report.difference is None
    assert (report.rounds, report.plans) == (240, 240)


def test_a_server_whose_profile_never_drafted_is_replayed(tmp_path: Path) -> None:
    recorder, parts = FlightRecorder(tmp_path, rounds=100), new_parts()
    parts = parts._replace(cost=CostModel.fit([sample for sample in parts.cost.samples if not sample.drafted]))
    run(recorder.watch(make_policy("adaptive", parts), parts), 400)
    report = replay(written(recorder))
    assert report.difference is None
    assert report.plans > 50


def test_rounds_and_bytes_are_bounded(tmp_path: Path) -> None:
    parts = new_parts()
    by_rounds = FlightRecorder(tmp_path, rounds=32)
    run(by_rounds.watch(make_policy("full", parts), parts), 200)
    assert by_rounds.rounds == 32
    by_bytes = FlightRecorder(tmp_path, max_bytes=100_000)
    run(by_bytes.watch(make_policy("adaptive", parts), parts), 400)
    assert 80_000 < by_bytes.bytes <= 100_000
    recording = by_bytes.recording("test")
    assert len(recording.snapshots) <= 6
    report = replay(recording, None)
    assert report.difference is None
    assert report.plans > 0.6 * report.rounds


def test_the_engine_may_reuse_its_buffers(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path)
    parts = new_parts()
    policy = recorder.watch(make_policy("full", parts), parts)
    batch = Batch.ordinary(np.array([0]), np.array([10]))
    plan = policy.plan(batch)
    confidence_RG = np.full((1, GAMMA), 0.5, dtype=np.float32)
    lens_R = policy.admit(batch, plan, confidence_RG)
    accepted_R = np.array([3], dtype=np.int32)
    policy.observe(Outcome(batch, plan, confidence_RG, lens_R, accepted_R, 0.001, 0.002, True))
    for array in (*batch, confidence_RG, lens_R, accepted_R):
        array[...] = 1
    kept = recorder.recording("test").rounds[0].outcome
    assert kept.batch.context_R.tolist() == [10]
    assert kept.confidence_RG is not None
    assert kept.confidence_RG.tolist() == [[0.5] * GAMMA]
    assert (kept.verify_lens_R.tolist(), kept.accepted_R.tolist()) == ([GAMMA + 1], [3])


def watched(tmp_path: Path, expected: float, clock: list[float]) -> Callable[..., None]:
    """Runs a round of given seconds and confidence under a policy that expects `expected` seconds."""

    class Expecting:
        name = "full"

        def plan(self, batch: Batch) -> Plan:
            return Plan(True, 0.0, 8, "full", 1.0, expected)

        def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
            return np.full(1, GAMMA + 1, dtype=np.int32)

        def terms(self, batch: Batch) -> None:
            pass

        def observe(self, outcome: Outcome) -> None:
            pass

    recorder = FlightRecorder(tmp_path, clock=lambda: clock[0])
    policy = recorder.watch(Expecting(), new_parts())

    def one_round(seconds: float, confidence: float = 0.5) -> None:
        batch = Batch.ordinary(np.array([0]), np.array([10]))
        plan = policy.plan(batch)
        confidence_RG = np.full((1, GAMMA), confidence, dtype=np.float32)
        lens_R = policy.admit(batch, plan, confidence_RG)
        policy.observe(Outcome(batch, plan, confidence_RG, lens_R, np.array([0]), 0.001, seconds, True))
        recorder.wait()

    return one_round


def test_anomalies_write_a_bounded_number_of_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    one_round = watched(tmp_path, 0.01, clock)
    for _ in range(7):
        one_round(0.05)
    one_round(0.02)
    assert not list(tmp_path.iterdir())
    with caplog.at_level(logging.WARNING):
        for _ in range(8):
            one_round(0.05)
    assert len(list(tmp_path.iterdir())) == 1
    assert "50.0 ms, 10.0 ms were expected" in caplog.text
    one_round(0.01, float("nan"))
    assert len(list(tmp_path.iterdir())) == 1  # not yet again
    for _ in range(30):
        clock[0] += 61.0
        one_round(0.01, 1.5)
    assert len(list(tmp_path.glob("*.npz"))) == 8
    reasons = {read_recording(path).header.reason for path in tmp_path.iterdir()}
    assert "a confidence is no probability" in reasons


def test_a_directory_that_cannot_be_written_does_not_stop_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    one_round = watched(tmp_path / "file", 0.01, [0.0])
    one_round(0.01, float("inf"))
    assert "could not be written" in caplog.text


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "text", "cut", "foreign", "header", "array", "lengths", "block"]
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, damage: str) -> None:
    record(tmp_path, count=20)
    path = tmp_path / "adaptive.npz"
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage in ("empty", "text", "cut"):
        path.write_bytes({"empty": b"", "text": b"not a recording", "cut": content[: len(content) // 2]}[damage])
    else:
        if damage == "foreign":
            arrays = {"weights": np.zeros(3)}
        elif damage == "header":
            arrays["header"] = arrays["header"][:-5]
        elif damage == "array":
            del arrays["request.accepted"]
        elif damage == "lengths":
            arrays["request.accepted"] = arrays["request.accepted"][1:]
        elif damage == "block":
            arrays["request.verify_lens"] += GAMMA
        np.savez_compressed(path, **arrays)
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_recording(path)
    assert "recording of version 1" in str(caught.value)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.npz"
    np.savez(path, header=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="cannot be read"):
        read_recording(path)


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    record(tmp_path, count=20)
    path = tmp_path / "adaptive.npz"
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("confidence.npy").header_offset + 200
    content = bytearray(path.read_bytes())
    content[start] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_recording(path)
