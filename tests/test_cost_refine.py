"""The cost model while an engine runs: noise, outliers, a machine that changes, points that are never visited."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dspark_serving.scheduler.cost import CostModel
from tests.cost_world import World, serve

SEEDS = range(3)


def profiled(world: World, seed: int) -> tuple[CostModel, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return CostModel.fit(world.profile(rng), world.tiers), rng


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tiers", [None, (6, 12, 24, 48, 96)])
def test_a_wrong_profile_is_corrected_online(tiers: tuple[int, ...] | None, seed: int) -> None:
    """The profile was taken on a machine where tokens cost less and every round took less."""
    truth = World(tiers)
    rng = np.random.default_rng(seed)
    skewed = [
        sample._replace(seconds=sample.seconds * (0.9 - 0.04 * math.log2(sample.tokens)))
        for sample in World(tiers, noise=0.02).profile(rng)
    ]
    model = CostModel.fit(skewed, tiers)
    before = np.median(truth.errors(model))
    serve(model, truth.live(rng, 600))
    assert before > 0.15
    assert np.median(truth.errors(model)) < 0.04


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("poison", [0.1, 0.2])
def test_outliers_do_not_poison(poison: float, seed: int) -> None:
    world = World()
    model, rng = profiled(world, seed)
    serve(model, replace(world, poison=poison).live(rng, 1000))
    errors = world.errors(model)
    assert np.median(errors) < 0.06
    assert errors.max() < 0.2
    # The same rounds move an unprotected mean by far more.
    mean = np.mean([sample.seconds for sample in replace(world, poison=poison).live(rng, 1000)])
    clean = np.mean([sample.seconds for sample in world.live(rng, 1000)])
    assert mean / clean > 1.5


@pytest.mark.parametrize("seed", SEEDS)
def test_a_short_burst_of_outliers_passes(seed: int) -> None:
    world = World()
    model, rng = profiled(world, seed)
    serve(model, world.live(rng, 200))
    serve(model, replace(world, speed=8.0).live(rng, 5))
    assert np.median(world.errors(model)) < 0.15
    serve(model, world.live(rng, 60))
    assert np.median(world.errors(model)) < 0.06


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("speed", [1.5, 0.6])
def test_a_lasting_change_is_followed(speed: float, seed: int) -> None:
    world = World()
    model, rng = profiled(world, seed)
    serve(model, world.live(rng, 300))
    world.speed = speed
    serve(model, world.live(rng, 80))
    assert np.median(world.errors(model)) < 0.08
    assert model.draft(4) == pytest.approx(world.draft(4), rel=0.1)
    assert model.plain(4, 1000) == pytest.approx(world.plain(4, 1000), rel=0.12)


@pytest.mark.parametrize("drafted", [True, False])
def test_points_never_visited_follow_the_machine(drafted: bool) -> None:
    world = World(noise=0.02)
    model, rng = profiled(world, 0)
    world.speed = 1.5
    tokens = 24 if drafted else 8
    serve(model, (world.round(rng, 8, tokens, 3000, drafted) for _ in range(120)))
    assert world.errors(model, requests=(1, 2, 16)).max() < 0.15
    assert model.plain(1, 400) == pytest.approx(world.plain(1, 400), rel=0.15)
    assert model.draft(1) == pytest.approx(world.draft(1), rel=0.15)


def test_a_total_that_is_faster_than_its_profile_is_learned_at_once_and_one_slow_round_is_not() -> None:
    tiers = (6, 12, 24, 48, 96)
    world = World(tiers, noise=0.02)
    for speed, found in ((1 / 1.3, 0.08), (1.3, 0.15)):
        model, rng = profiled(world, 0)
        true = world.verify(8, 48, 3000)
        moved = world.round(rng, 8, 48, 3000)
        rest = moved.seconds - moved.draft_seconds
        before = float(model.verify(8, np.array([48]), 3000)[0])
        serve(model, iter([moved._replace(seconds=moved.draft_seconds + rest * speed)]))
        after = float(model.verify(8, np.array([48]), 3000)[0])
        assert (abs(after / (true * speed) - 1) < found) == (speed < 1)
        assert abs(float(model.verify(8, np.array([24]), 3000)[0]) / world.verify(8, 24, 3000) - 1) < 0.06
        assert (after - before) * (speed - 1) > 0


def test_the_doubt_about_a_total_goes_with_its_rounds() -> None:
    model, rng = profiled(World((6, 12, 24, 48, 96)), 0)
    totals = np.array([12, 24, 48])
    np.testing.assert_array_equal(model.doubt(8, totals), [0.25, 0.25, 0.25])
    serve(model, (World().round(rng, 8, 24, 3000) for _ in range(4)))
    np.testing.assert_allclose(model.doubt(8, totals), [0.25, 0.05, 0.25])
    np.testing.assert_array_equal(CostModel.unknown().doubt(8, totals), [0, 0, 0])


def test_a_local_change_leaves_distant_points_nearly_alone() -> None:
    """Only batches of one get slower: the others, visited as often, keep their predictions."""
    world, slow = World(noise=0.02), World(noise=0.02, speed=1.4)
    model, rng = profiled(world, 0)
    for _ in range(200):
        serve(model, slow.live(rng, 1, requests=(1,)))
        serve(model, world.live(rng, 1, requests=(16,)))
    assert np.median(slow.errors(model, requests=(1,))) < 0.06
    assert np.median(world.errors(model, requests=(16,))) < 0.06


def test_impossible_observations_are_counted_and_change_nothing() -> None:
    model, _ = profiled(World(), 0)
    totals = np.arange(4, 25)
    before = model.verify(4, totals, 1000), model.draft(4), model.plain(4, 1000)
    impossible = [
        (4, 12, 1000, 0.01, -0.1, True),
        (4, 12, 1000, 0.01, 0.0, True),
        (4, 12, 1000, 0.01, math.nan, True),
        (4, 12, 1000, 0.01, math.inf, True),
        (4, 12, 1000, math.nan, 0.1, True),
        (4, 12, 1000, -0.01, 0.1, True),
        (4, 12, 1000, 0.2, 0.1, True),
        (4, 4, 1000, 0.0, -0.1, False),
        (0, 0, 0, 0.0, 0.1, False),
    ]
    for observation in impossible:
        model.observe(*observation)
    assert (model.rejected, model.observed) == (len(impossible), 0)
    np.testing.assert_array_equal(model.verify(4, totals, 1000), before[0])
    assert (model.draft(4), model.plain(4, 1000)) == before[1:]


def test_sureness_grows_where_rounds_scatter_and_settles_where_they_agree() -> None:
    model, rng = profiled(World(), 0)
    unvisited = model.sureness(32, 100)
    serve(model, (World(noise=0.02).round(rng, 32, 100, 9000) for _ in range(200)))
    calm = model.sureness(32, 100)
    serve(model, (World(noise=0.3).round(rng, 32, 100, 9000) for _ in range(200)))
    assert calm < unvisited
    assert model.sureness(32, 100) > 2 * calm
