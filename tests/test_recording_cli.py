"""`dspark calibrate` and `dspark replay` on recordings of a made-up engine, and the sums of "what if" by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dspark_serving.cli.main import app
from dspark_serving.recording import FlightRecorder, Recording, read_recording, what_if, write_recording
from dspark_serving.recording.rounds import Round
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.catalog import make_policy
from tests.recorded import GAMMA, new_parts, run, seconds_of


def dspark(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with adaptive.npz, full.npz and off.npz."""
    directory = tmp_path_factory.mktemp("recordings")
    for name in ("adaptive", "full", "off"):
        recorder, parts = FlightRecorder(directory), new_parts()
        run(recorder.watch(make_policy(name, parts), parts), 300)
        recorder.dump(directory / f"{name}.npz")
        recorder.wait()
    return directory


def test_calibrate_writes_temperatures_a_diagram_and_the_scores(files: Path, tmp_path: Path) -> None:
    output, plot = tmp_path / "out" / "calibration.json", tmp_path / "out" / "reliability.png"
    code, out, _ = dspark("calibrate", files / "full.npz", files / "adaptive.npz", "--output", output, "--plot", plot)
    assert code == 0
    fitted = Calibration.load(output, GAMMA)
    assert fitted.fitted_on["recordings"] == 2
    assert fitted.temperatures_G[0] != 1.0
    assert f"{fitted.temperatures_G[0]:.3f}" in out
    for score in ("ECE", "Brier", "AUROC"):
        assert score in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_calibrate_draws_svg_too_and_refuses_other_endings(files: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", files / "full.npz", "--output", tmp_path / "c.json", "--plot")
    assert dspark(*arguments, tmp_path / "plot.svg")[0] == 0
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    code, _, err = dspark(*arguments, tmp_path / "plot.xyz")
    assert code == 2
    assert "plot.xyz" in err


def test_calibrate_needs_drafts(files: Path, tmp_path: Path) -> None:
    code, _, err = dspark("calibrate", files / "off.npz", "--output", tmp_path / "c.json")
    assert code == 2
    assert "no round of the recordings drafted" in err
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("name", ["adaptive", "full", "off"])
def test_replay_reproduces(files: Path, name: str) -> None:
    code, out, _ = dspark("replay", files / f"{name}.npz")
    assert code == 0
    assert "identical: 300 plans" in out


def test_replay_names_the_first_difference(files: Path, tmp_path: Path) -> None:
    recording = read_recording(files / "full.npz")
    kept = recording.rounds[7]
    plan = kept.outcome.plan._replace(price=0.25)
    rounds = (*recording.rounds[:7], kept._replace(outcome=kept.outcome._replace(plan=plan)), *recording.rounds[8:])
    write_recording(tmp_path / "tampered.npz", recording._replace(rounds=rounds))
    code, out, _ = dspark("replay", tmp_path / "tampered.npz")
    assert code == 1
    assert "round 7 differs: price was 0.25, is 0.0" in out


def test_replay_says_what_cannot_be_read_or_asked(files: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    code, _, err = dspark("replay", tmp_path / "broken.npz")
    assert code == 2
    assert err.count("\n") == 1
    assert "broken.npz" in err
    code, _, err = dspark("replay", files / "full.npz", "--policy", "best")
    assert code == 2
    assert "adaptive, full, threshold" in err


def test_what_if_says_that_it_estimates(files: Path) -> None:
    code, out, _ = dspark("replay", files / "full.npz", "--policy", "threshold", "--threshold", "0.5")
    assert code == 0
    assert "recorded (full)" in out
    assert "what if (threshold)" in out
    assert "estimates from calibrated survival" in out


def test_what_if_of_the_same_stateless_policy_is_what_was_recorded(files: Path) -> None:
    found = what_if(read_recording(files / "full.npz"), "full")
    assert found.recorded == found.other
    assert found.other.estimated == 0.0


def test_fewer_drafts_need_no_estimate(files: Path) -> None:
    recording = read_recording(files / "full.npz")
    found = what_if(recording, "threshold", 0.5)
    verified = accepted = 0
    seconds = 0.0
    for kept in recording.rounds:
        survival_RG = np.cumprod(kept.outcome.confidence_RG, axis=1)  # type: ignore[arg-type]
        drafts_R = (survival_RG >= 0.5).sum(axis=1)
        verified += int(drafts_R.sum())
        accepted += int(np.minimum(drafts_R, kept.outcome.accepted_R).sum())
        requests, context = kept.outcome.batch.requests, int(kept.outcome.batch.context_R.sum())
        seconds += seconds_of(requests, requests + int(drafts_R.sum()), context, True)
    assert (found.other.verified, found.other.accepted, found.other.estimated) == (verified, accepted, 0.0)
    assert found.other.seconds == pytest.approx(seconds, rel=0.05)
    assert found.recorded.verified > verified


def test_more_drafts_are_estimated_by_survival_beyond_what_was_verified(files: Path) -> None:
    full = read_recording(files / "full.npz")
    shortened = Recording(full.header, tuple(_verify_one(kept) for kept in full.rounds), full.snapshots)
    found = what_if(shortened, "full").other
    expected = 0.0
    for kept in shortened.rounds:
        for confidence_G, accepted in zip(kept.outcome.confidence_RG, kept.outcome.accepted_R, strict=True):  # type: ignore[arg-type]
            expected += sum(np.cumprod(confidence_G[1:])) if accepted == 1 else 0.0
    assert found.estimated == pytest.approx(expected, rel=1e-4)
    assert found.accepted == sum(int(kept.outcome.accepted_R.sum()) for kept in shortened.rounds)
    truth = sum(int(kept.outcome.accepted_R.sum()) for kept in full.rounds)
    assert found.accepted + found.estimated == pytest.approx(truth, rel=0.25)  # the head is off by a power of 1.3


def _verify_one(kept: Round) -> Round:
    lens_R = np.full_like(kept.outcome.verify_lens_R, 2)
    return kept._replace(
        outcome=kept.outcome._replace(verify_lens_R=lens_R, accepted_R=np.minimum(kept.outcome.accepted_R, 1))
    )


def test_rounds_without_drafts_cannot_answer_for_a_policy_that_drafts(files: Path) -> None:
    recording = read_recording(files / "off.npz")
    found = what_if(recording, "full")
    assert (found.other.rounds, found.unknown_rounds) == (0, 300)
    assert what_if(recording, "off").other.rounds == 300


def test_a_policy_from_outside_the_catalog_is_compared_but_not_reproduced(files: Path, tmp_path: Path) -> None:
    full = read_recording(files / "full.npz")
    foreign = full._replace(header=full.header.model_copy(update={"policy": "native"}))
    assert what_if(foreign, "full").other == what_if(full, "full").other
    write_recording(tmp_path / "native.npz", foreign)
    code, _, err = dspark("replay", tmp_path / "native.npz")
    assert code == 2
    assert "no policy 'native'" in err
