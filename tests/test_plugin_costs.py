"""Step times from the cache: kept where they still hold, measured again where they do not."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dspark_serving.config import ServingConfig
from dspark_serving.errors import OptionError
from dspark_serving.scheduler.baselines import ThresholdPolicy
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.catalog import PolicyParts
from dspark_serving.scheduler.cost import CostModel, CostSample
from dspark_serving.scheduler.cost_table import load_cost, save_cost
from dspark_serving.scheduler.round import Batch, Outcome
from dspark_serving.sglang_adapter import profile, scheduling
from tests.cost_world import World
from tests.test_cost_table import KEY

SCHEDULER = SimpleNamespace(
    draft_worker=SimpleNamespace(
        agree=lambda flag: flag, all_say=lambda flag: flag, model_runner=None, verify_num_draft_tokens=6
    ),
    max_total_num_tokens=4096,
    max_running_requests=16,
)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    """An engine without noise, whose rounds take what the world says at the moment."""
    world, rng = World(noise=0.0), np.random.default_rng(0)

    def measure(scheduler: Any, groups: list[Any], seconds: float) -> list[CostSample]:
        rounds = [(group, lens) for group in groups for lens in (1, 6)]
        return [
            world.round(
                rng, group.requests, group.requests * lens, group.requests * group.prompt, lens > 1,
                group.requests if group.temperature else 0,
            )
            for group, lens in rounds
        ]  # fmt: skip

    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    monkeypatch.setattr(profile, "_measure", measure)
    monkeypatch.setattr(scheduling, "ragged_capture_num_tokens", lambda model_runner: None)
    monkeypatch.setattr(scheduling, "get_parallel", lambda: SimpleNamespace(tp_rank=0))
    return world


@pytest.fixture
def deadlines(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of every measurement."""
    found: list[float] = []
    measure = profile._measure

    def noted(scheduler: Any, groups: list[Any], deadline: float) -> list[CostSample]:
        found.append(deadline)
        return measure(scheduler, groups, deadline)

    monkeypatch.setattr(profile, "_measure", noted)
    return found


def costs() -> CostModel:
    return scheduling._costs(SCHEDULER, ServingConfig(), KEY)


def test_a_table_that_holds_is_kept(tmp_path: Path) -> None:
    first, second = costs(), costs()
    assert second.samples == first.samples


def test_a_table_of_a_busier_hour_is_measured_again(tmp_path: Path, engine: World) -> None:
    engine.speed = 1.4
    slow = costs()
    engine.speed = 1.0
    now = costs()
    assert slow.plain(4, 100) / now.plain(4, 100) == pytest.approx(1.4, rel=0.02)
    kept = load_cost(tmp_path / "cost", KEY)
    assert kept is not None
    assert kept.samples == now.samples


def test_checking_tables_and_measuring_again_share_one_deadline(
    tmp_path: Path, engine: World, deadlines: list[float]
) -> None:
    save_cost(tmp_path / "carried", KEY, CostModel.fit(World(speed=3.0, noise=0.0).profile(np.random.default_rng(1))))
    engine.speed = 5.0
    costs()
    engine.speed = 1.0
    deadlines.clear()
    before = time.monotonic()
    scheduling._costs(SCHEDULER, ServingConfig(profile_seconds=7), KEY, tmp_path / "carried")
    assert len(deadlines) == 3  # the table of the cache, that of the bundle, a new one
    assert len(set(deadlines)) == 1
    assert before + 7 <= deadlines[0] <= time.monotonic() + 7


def test_without_measuring_a_table_is_taken_as_it_is(tmp_path: Path, engine: World) -> None:
    save_cost(tmp_path / "cost", KEY, CostModel.fit(World(speed=3.0, noise=0.0).profile(np.random.default_rng(1))))
    kept = scheduling._costs(SCHEDULER, ServingConfig(profile_seconds=0), KEY)
    assert kept.plain(1, 24) == pytest.approx(3 * engine.plain(1, 24), rel=0.05)


def test_a_table_that_another_rank_lacks_is_measured_again_by_all(
    engine: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.speed = 1.1
    first = costs()
    engine.speed = 1.0
    monkeypatch.setattr(SCHEDULER.draft_worker, "all_say", lambda flag: False)
    assert costs().samples != first.samples


def repertoire(cost: CostModel) -> scheduling.Repertoire:
    return scheduling.Repertoire(
        PolicyParts(gamma=3, slots=4, cost=cost, calibration=Calibration.identity(3), threshold=0.25, speed_floor=0.0)
    )


def test_sglangs_planner_is_refused_without_step_times() -> None:
    with pytest.raises(OptionError, match=r"policy native without step times; expected .*--dspark-profile-seconds"):
        repertoire(CostModel.unknown()).get("native")


def test_a_calibration_that_cannot_be_used_is_said_and_the_server_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "calibration.json").write_text("{")
    assert scheduling._calibration(ServingConfig(), tmp_path, 3) is None
    assert "calibration.json cannot be used" in caplog.text
    Calibration((1.5, 1.0)).save(tmp_path / "calibration.json")  # for another block size
    assert scheduling._calibration(ServingConfig(), tmp_path, 3) is None
    Calibration((1.5, 1.0, 0.8)).save(tmp_path / "calibration.json")
    assert getattr(scheduling._calibration(ServingConfig(), tmp_path, 3), "temperatures_G", None) == (1.5, 1.0, 0.8)
    assert scheduling._calibration(ServingConfig(), tmp_path / "none", 3) == Calibration.identity(3)
    refused = scheduling.Repertoire(repertoire(CostModel.unknown()).parts, calibration_refused=True)
    assert (refused.facts()["calibration_refused"], repertoire(CostModel.unknown()).facts()["calibration_refused"]) == (
        1,
        0,
    )


def test_confidences_are_judged_under_every_policy() -> None:
    found = repertoire(CostModel.fit(World().profile(np.random.default_rng(0))))
    batch = Batch.ordinary(np.arange(4), np.full(4, 100))
    confidence_RG = np.full((4, 3), 0.9, dtype=np.float32)
    lens_R, accepted_R = np.full(4, 4, dtype=np.int32), np.zeros(4, dtype=np.int32)
    for name in ("off", "full"):
        plan = found.get(name).plan(batch)
        shown_RG = confidence_RG if plan.drafts else None
        found.learn(name, Outcome(batch, plan, shown_RG, lens_R, accepted_R, 0.01, 0.1, True))
        assert ("calibration_error_position_1" in found.facts()) == (name == "full")
    assert found.facts()["calibration_error_position_1"] == pytest.approx(0.9, abs=0.01)
    assert 0 < found.facts()["cost_uncertainty"] < 1


def test_a_threshold_holds_until_the_policy_is_asked_for_without_one() -> None:
    found = repertoire(CostModel.unknown())
    thresholds = []
    for given in (None, 0.75, None):
        found.set_threshold(given)
        policy = found.get("threshold")
        assert isinstance(policy, ThresholdPolicy)
        thresholds.append(policy.threshold)
    assert thresholds == [0.25, 0.75, 0.25]


def test_a_table_of_the_bundle_is_taken_where_the_cache_has_none_and_it_holds(tmp_path: Path, engine: World) -> None:
    carried = tmp_path / "bundle"
    save_cost(carried, KEY, CostModel.fit(World(noise=0.0).profile(np.random.default_rng(1))))
    before = (carried / KEY.file_name).read_bytes()
    found = scheduling._costs(SCHEDULER, ServingConfig(), KEY, carried)
    assert found.samples == getattr(load_cost(carried, KEY), "samples", None)
    assert not (tmp_path / "cost").exists()  # nothing was measured
    engine.speed = 2.0
    measured = scheduling._costs(SCHEDULER, ServingConfig(), KEY, carried)
    assert measured.plain(4, 100) / found.plain(4, 100) == pytest.approx(2.0, rel=0.02)
    assert (carried / KEY.file_name).read_bytes() == before
