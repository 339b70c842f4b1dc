"""Step times from the cache: kept where they still hold, measured again where they do not."""

from __future__ import annotations

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
