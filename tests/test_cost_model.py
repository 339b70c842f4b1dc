"""The fitted cost model against engines whose step times are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_serving.errors import DataError
from dspark_serving.scheduler.cost import CostModel, CostSample
from tests.cost_world import GAMMA, World

TIERS = (6, 12, 24, 48, 96)
SEEDS = range(3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tiers", [None, TIERS])
def test_fit_predicts_measured_and_unmeasured_totals(tiers: tuple[int, ...] | None, seed: int) -> None:
    world = World(tiers)
    model = CostModel.fit(world.profile(np.random.default_rng(seed)), tiers)
    errors = world.errors(model)
    assert np.median(errors) < 0.05
    assert errors.max() < 0.15
    for requests in (1, 3, 8, 12):
        assert model.draft(requests) == pytest.approx(world.draft(requests), rel=0.1)
        assert model.plain(requests, 300 * requests) == pytest.approx(world.plain(requests, 300 * requests), rel=0.12)


def test_fit_without_noise_is_exact_where_the_world_is_linear() -> None:
    world = World(noise=0.0)
    model = CostModel.fit(world.profile(np.random.default_rng(0)))
    assert world.errors(model, requests=(1, 4, 8, 16, 32)).max() < 0.01
    assert model.draft(32) == pytest.approx(world.draft(32), rel=0.01)
    slope = model.plain(8, 20_000) - model.plain(8, 10_000)
    assert slope == pytest.approx(10_000 * world.context_slope, rel=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_fit_survives_outliers_in_the_profile(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = CostModel.fit(World(poison=0.15).profile(rng, repetitions=3))
    assert np.median(World().errors(model)) < 0.06


def test_what_sampling_adds_is_told_apart_and_carries_over_to_other_batches() -> None:
    world, rng = World(noise=0.02, sampled_token=0.002), np.random.default_rng(0)
    greedy = world.profile(rng)
    sampled = [world.round(rng, 8, tokens, 2000, drafted=tokens > 8, sampled=8) for tokens in (8, 8, 24, 24, 48, 48)]
    model = CostModel.fit([*greedy, *sampled])
    assert np.median(world.errors(model)) < 0.05
    for requests, share in ((2, 2), (16, 4), (16, 16)):
        total = 4 * requests
        expected = world.verify(requests, total, 400 * requests, share)
        assert model.verify(requests, np.array([total]), 400 * requests, share)[0] == pytest.approx(expected, rel=0.08)
        assert model.draft(requests, share) == pytest.approx(world.draft(requests, share), rel=0.15)
        plain = world.plain(requests, 400 * requests, share)
        assert model.plain(requests, 400 * requests, share) == pytest.approx(plain, rel=0.12)
    # A model that was never told of sampled rounds is off by what they add.
    assert CostModel.fit(greedy).verify(16, np.array([64]), 6400, 16)[0] < 0.75 * world.verify(16, 64, 6400, 16)


def test_tiers_round_up_and_beyond_the_last_one_every_token_costs() -> None:
    world = World(TIERS)
    model = CostModel.fit(world.profile(np.random.default_rng(0)), TIERS)
    totals = np.array([7, 12, 13, 24, 96, 97, 120])
    seconds = model.verify(4, totals, 1000)
    assert seconds[0] == seconds[1]
    assert seconds[2] == seconds[3]
    assert seconds[1] < seconds[2] < seconds[4] < seconds[5] < seconds[6]


def test_extrapolation_goes_on_with_the_last_slope() -> None:
    samples = [CostSample(1, tokens, 0, 0.01, 0.01 + 0.05 + 0.002 * tokens, True) for tokens in (2, 4, 6)]
    model = CostModel.fit(samples)
    np.testing.assert_allclose(model.verify(1, np.array([1, 5, 50, 500]), 0), [0.052, 0.06, 0.15, 1.05], rtol=0.01)


@pytest.mark.parametrize(
    "samples",
    [
        [CostSample(1, 1, 100, 0.0, 0.08, False)],
        [CostSample(1, 6, 100, 0.01, 0.1, True)],
        [CostSample(4, tokens, 800, 0.014, 0.1 + 0.002 * tokens, True) for tokens in (4, 12, 24)],
        [CostSample(requests, requests, 64, 0.0, 0.08 + 0.01 * requests, False) for requests in (1, 4, 8)],
        [CostSample(2, 8, 100, 0.01, 0.1, True)] * 20,
    ],
)
def test_few_or_lopsided_samples_give_usable_predictions(samples: list[CostSample]) -> None:
    model = CostModel.fit(samples)
    for sample in samples:
        if sample.drafted:
            predicted = model.draft(sample.requests) + model.verify(
                sample.requests, np.array([sample.tokens]), sample.context
            )
            assert predicted[0] == pytest.approx(sample.seconds, rel=0.02)
        else:
            assert model.plain(sample.requests, sample.context) == pytest.approx(sample.seconds, rel=0.02)
    for requests in (1, 2, 8, 300):
        seconds = model.verify(requests, np.arange(requests, 6 * requests + 1), 500)
        assert np.isfinite(seconds).all()
        assert (seconds > 0).all()
        assert 0 < model.plain(requests, 500) < math.inf
        assert 0 <= model.draft(requests) < math.inf


def test_plain_falls_back_on_verifying_the_anchors() -> None:
    world = World()
    model = CostModel.fit([sample for sample in world.profile(np.random.default_rng(0)) if sample.drafted])
    assert model.plain(4, 900) == model.verify(4, np.array([4]), 900)[0]


def test_draft_time_that_was_never_measured_is_free_until_it_is() -> None:
    model = CostModel.fit([CostSample(1, 1, 100, 0.0, 0.08, False)])
    assert model.draft(1) == 0.0
    model.observe(1, 6, 100, 0.012, 0.1, True)
    assert model.draft(1) == pytest.approx(0.012, rel=0.05)


def test_without_data_nothing_is_predicted() -> None:
    model = CostModel.unknown()
    assert not model.known
    model.observe(1, 6, 100, 0.01, 0.1, True)
    assert np.isnan(model.verify(2, np.array([2, 12]), 100)).all()
    assert math.isnan(model.plain(2, 100))
    assert math.isnan(model.draft(2))
    assert model.sureness(2, 12) == math.inf
    assert CostModel.fit([CostSample(1, 1, 1, 0.0, 0.1, False)]).known


def test_sureness_falls_with_distance_from_the_measured_points() -> None:
    model = CostModel.fit(World().profile(np.random.default_rng(0), requests=(1, 4)))
    near, far, farther = model.sureness(4, 24), model.sureness(16, 96), model.sureness(128, 700)
    assert 0 < near < 0.1 < far < farther < math.inf
    noisy = CostModel.fit(World(noise=0.2).profile(np.random.default_rng(0), requests=(1, 4)))
    assert noisy.sureness(4, 24) > 2 * near


@pytest.mark.parametrize(
    "sample",
    [
        CostSample(1, 6, 100, 0.01, -0.1, True),
        CostSample(1, 6, 100, 0.01, math.nan, True),
        CostSample(1, 6, 100, 0.01, math.inf, True),
        CostSample(1, 6, 100, 0.2, 0.1, True),
        CostSample(1, 6, 100, 0.0, 0.1, True),
        CostSample(1, 1, 100, 0.01, 0.1, False),
        CostSample(1, 2, 100, 0.0, 0.1, False),
        CostSample(4, 2, 100, 0.01, 0.1, True),
        CostSample(0, 0, 100, 0.01, 0.1, True),
        CostSample(2, 6, 100, 0.01, 0.1, True, 3),
        CostSample(1, 6, -1, 0.01, 0.1, True),
    ],
)
def test_impossible_samples_are_refused(sample: CostSample) -> None:
    with pytest.raises(DataError, match="impossible cost sample"):
        CostModel.fit([CostSample(1, 6, 100, 0.01, 0.1, True), sample])


def test_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="no cost samples"):
        CostModel.fit([])


times = st.floats(1e-4, 10)
drafting = st.builds(
    lambda requests, per_request, context, draft, rest: CostSample(
        requests, requests * per_request, context, draft, draft + rest, True
    ),
    st.integers(1, 64),
    st.integers(1, GAMMA + 1),
    st.integers(0, 100_000),
    times,
    times,
)
plain = st.builds(
    lambda requests, context, seconds: CostSample(requests, requests, context, 0.0, seconds, False),
    st.integers(1, 64),
    st.integers(0, 100_000),
    times,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(drafting | plain, min_size=1, max_size=12),
    st.lists(drafting | plain, max_size=20),
    st.sampled_from([None, TIERS]),
)
def test_monotone_and_positive_whatever_was_measured(
    samples: list[CostSample], rounds: list[CostSample], tiers: tuple[int, ...] | None
) -> None:
    model = CostModel.fit(samples, tiers)
    for sample in rounds:
        model.observe(*sample)
    for requests in (1, 3, 20, 100):
        seconds = model.verify(requests, np.arange(requests, requests * 8), 1000)
        assert (seconds > 0).all()
        assert np.isfinite(seconds).all()
        assert (np.diff(seconds) >= -1e-12 * seconds[:-1]).all()
        assert model.plain(requests, 2000) >= model.plain(requests, 1000) > 0
        assert 0 <= model.draft(requests) < math.inf
