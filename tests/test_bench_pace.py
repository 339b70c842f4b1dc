"""Arms that ran while the machine was faster or slower, compared at equal pace."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dspark_serving.bench.outcome import write_outcome
from dspark_serving.bench.pace import Pace
from dspark_serving.bench.results import ResultFile
from dspark_serving.bench.runs import Run, RunFile
from dspark_serving.bench.statistics import speed_ratio
from dspark_serving.bench.sweep import Events, Sweep
from dspark_serving.errors import DataError, EnvironmentMismatchError
from tests.bench_runs import StandInClient, one_by_one, policy_arms, settings_of
from tests.fake_server import fake_server


@pytest.fixture(scope="module")
def pace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pace]:
    with Pace(tmp_path_factory.mktemp("logs") / "pace.log") as running:
        yield running


def at_pace(arm: str, seconds: list[float], pace_seconds: float) -> Run:
    return replace(one_by_one(arm, seconds), pace_seconds=pace_seconds)


def test_an_arm_that_met_a_slow_machine_is_not_blamed() -> None:
    slow, fast = at_pace("full", [3.0, 6.0], 0.003), at_pace("off", [2.0, 4.0], 0.002)
    assert speed_ratio([slow], [fast]).value == pytest.approx(2 / 3)
    assert speed_ratio([slow], [fast], equal_pace=True) == pytest.approx((1.0, 1.0, 1.0))
    slower = replace(slow, seconds=2 * slow.seconds)
    assert speed_ratio([slower], [fast], equal_pace=True).value == pytest.approx(0.5)
    with pytest.raises(DataError, match="has no pace"):
        speed_ratio([slow], [one_by_one("off", [2.0, 4.0])], equal_pace=True)


def test_both_verdicts_are_told(tmp_path: Path) -> None:
    settings = settings_of(*policy_arms("http://a", "off", "adaptive"), repetitions=1, pace=True)
    runs = [at_pace("off", [2.0, 4.0], 0.002), at_pace("adaptive", [3.0, 6.0], 0.003)]
    file = ResultFile("figures", tmp_path / "figures.json")
    said = write_outcome(settings, runs, file) or ""
    raw, equal = said.split("At equal pace")
    assert "Below 0.97 at 1 of 1 points" in raw
    assert "Nowhere below 0.97" in equal
    (summary,) = [
        row
        for row in json.loads(file.path.read_text())["rows"]
        if row.get("arm") == "adaptive" and row["repetition"] is None
    ]
    assert (summary["pace_seconds"], summary["ratio_to_best_other"]) == pytest.approx((0.003, 2 / 3))
    assert summary["ratio_to_best_other_at_equal_pace"] == pytest.approx(1.0)
    assert "| 1.00 (1.00-1.00) |" in file.path.with_suffix(".md").read_text()


def test_the_work_is_timed_by_the_cpu_and_not_by_the_clock(pace: Pace) -> None:
    start = time.monotonic()
    found = pace.seconds(start, start)  # no time has passed: the next one counts
    assert 0.0 < found < 0.2
    assert time.monotonic() > start
    time.sleep(0.7)
    assert 0.0 < pace.seconds(start, time.monotonic()) < 0.2


def test_a_sweep_keeps_the_pace_of_every_run(pace: Pace, tmp_path: Path) -> None:
    with fake_server() as server:
        settings = settings_of(*policy_arms(server.url, "off", "full"), pace=True)
        file = RunFile(tmp_path / "sweep.runs.jsonl", settings)
        quiet = Events(step=lambda _: None, run=lambda _: None)
        Sweep(settings, StandInClient(tmp_path), file, quiet, tmp_path, pace).measure()
    assert len(file.runs) == 4
    assert all(run.pace_seconds for run in file.runs)
    assert RunFile(tmp_path / "sweep.runs.jsonl", settings).runs == file.runs
    with pytest.raises(DataError, match=r"other settings \(pace\)"):
        RunFile(tmp_path / "sweep.runs.jsonl", replace(settings, pace=False))


def test_a_lost_process_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with Pace(tmp_path / "pace.log") as lost:
        lost.seconds(0.0, 0.0)
        os.kill(lost._process.pid, signal.SIGKILL)
        lost._process.wait()
        with pytest.raises(EnvironmentMismatchError, match="gone or stuck"):
            lost.seconds(time.monotonic() + 1, time.monotonic() + 2)
