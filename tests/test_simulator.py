"""The simulator: its accounting by hand, its promises of fairness, and the adaptive policy's in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dspark_serving.errors import DataError
from dspark_serving.scheduler.baselines import FullPolicy, OffPolicy, ThresholdPolicy
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.catalog import PolicyParts, make_policy
from dspark_serving.scheduler.cost import CostModel
from dspark_serving.scheduler.round import Batch, Outcome, Plan, Policy
from dspark_serving.simulator import report
from dspark_serving.simulator.oracle import OraclePolicy
from dspark_serving.simulator.profile import measure
from dspark_serving.simulator.runner import Run, Simulation
from dspark_serving.simulator.scenarios import SCENARIOS
from dspark_serving.simulator.worlds import Domain, Machine, World, square, still

COIN = Domain("coin", 0.0, by_position=0.0, by_request=0.0, by_passage=0.0, by_token=0.0)
"""Every drafted token survives with a chance of one half."""
MACHINE = Machine(
    floor_seconds=4.0,
    token_seconds=1.0,
    request_seconds=0.5,
    context_seconds=0.0,
    draft_floor_seconds=1.0,
    draft_request_seconds=0.25,
    smooth=1e-3,
)


def coin_world(requests: int = 2, **changes: object) -> World:
    world = World("coins", "stationary", MACHINE, (COIN,), still(requests), gamma=2, rounds=200)
    return replace(world, **changes)  # type: ignore[arg-type]


def scenario(name: str) -> World:
    return next(world for world in SCENARIOS if world.name == name)


def adaptive(world: World, seed: int) -> Policy:
    cost = CostModel.fit(measure(world, seed), world.machine.tiers)
    return make_policy(
        "adaptive", PolicyParts(world.gamma, world.slots, cost, Calibration.identity(world.gamma), 0.3, 0.0)
    )


def test_tokens_and_seconds_by_hand() -> None:
    simulation = Simulation(coin_world(), seed=0)
    full = simulation.play(FullPolicy())
    # A round: two requests, 1 + 1/2 + 1/4 tokens each; draft 1 + 2/4, six tokens at 1 s, host 2/2.
    assert full.tokens / full.rounds == pytest.approx(2 * 1.75)
    assert full.seconds / full.rounds == pytest.approx(1.5 + 6.0 + 1.0, rel=1e-3)
    assert full.accepted_length == pytest.approx(1.75)
    assert (full.verified_tokens, full.drafting_rounds) == (6 * full.rounds, full.rounds)
    off = simulation.play(OffPolicy())
    # Two tokens: the weights are read in 4 s whatever is computed with them.
    assert off.tokens_per_second == pytest.approx(2 / (4.0 + 1.0), rel=1e-3)
    assert (off.rounds, off.drafting_rounds) == (200, 0)


def test_drawn_tokens_agree_with_the_expected_ones() -> None:
    simulation = Simulation(coin_world(rounds=3000), seed=1)
    drawn: list[int] = []

    class Counting(FullPolicy):
        def observe(self, outcome: Outcome) -> None:
            drawn.append(int(outcome.accepted_R.sum()) + outcome.batch.requests)

    run = simulation.play(Counting())
    assert sum(drawn) == pytest.approx(run.tokens, rel=0.02)


def test_a_graph_costs_its_tier() -> None:
    machine = replace(MACHINE, tiers=(8, 16))
    assert machine.verify(1, np.array([3, 8, 9, 16, 20]), 0).tolist() == pytest.approx([8.5, 8.5, 16.5, 16.5, 20.5])


def test_bursts_change_the_batch() -> None:
    sizes: list[int] = []

    class Watching(OffPolicy):
        def plan(self, batch: Batch) -> Plan:
            sizes.append(batch.requests)
            return super().plan(batch)

    Simulation(replace(coin_world(), requests=square(1, 5, 2)), seed=0).play(Watching())
    assert set(sizes) == {1, 5}
    assert sizes[0] == 1
    assert sizes[-1] == 5


def test_a_seed_repeats_everything_and_another_one_does_not() -> None:
    world = replace(scenario("cpu-8-mixed"), rounds=150)
    runs = [Simulation(world, seed).play(adaptive(world, seed)) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_playing_twice_starts_anew() -> None:
    simulation = Simulation(coin_world(), seed=0)
    first = simulation.play(ThresholdPolicy(0.4))
    simulation.play(FullPolicy())
    assert simulation.play(ThresholdPolicy(0.4)) == first


@pytest.mark.parametrize("lag", [0, 1])
def test_results_come_as_late_as_the_engine_tells_them(lag: int) -> None:
    events: list[str] = []

    class Logging(FullPolicy):
        def plan(self, batch: Batch) -> Plan:
            events.append("plan")
            return super().plan(batch)

        def observe(self, outcome: Outcome) -> None:
            events.append("observe")

    Simulation(coin_world(lag=lag), seed=0).play(Logging())
    assert events[: 2 + lag] == ["plan"] * (1 + lag) + ["observe"]


def test_confidences_are_bent_as_the_world_says_and_the_truth_is_not() -> None:
    world = coin_world(confidence_shift=still(1.0))
    simulation = Simulation(world, seed=0)
    seen: list[np.ndarray] = []

    class Watching(FullPolicy):
        def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
            seen.append(confidence_RG)
            assert simulation.conditional(batch.slots_R) == pytest.approx(0.5)
            return super().admit(batch, plan, confidence_RG)

    simulation.play(Watching())
    assert seen[0] == pytest.approx(1 / (1 + np.exp(-1.0)))


def test_impossible_verify_lengths_are_refused() -> None:
    class Greedy(FullPolicy):
        def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
            return super().admit(batch, plan, confidence_RG) + 1

    with pytest.raises(DataError, match="2 numbers from 1 to 3"):
        Simulation(coin_world(), seed=0).play(Greedy())


@pytest.mark.parametrize("name", ["cpu-4", "gpu-16", "cpu-overconfident"])
def test_nobody_beats_the_oracle(name: str) -> None:
    world = replace(scenario(name), rounds=600)
    simulation = Simulation(world, seed=0)
    oracle = simulation.play(OraclePolicy(simulation)).tokens_per_second
    rivals: list[Policy] = [
        OffPolicy(),
        FullPolicy(),
        *(ThresholdPolicy(0.1 * k) for k in range(1, 9)),
        adaptive(world, 0),
    ]
    rates = [simulation.play(policy).tokens_per_second for policy in rivals]
    assert max(rates) <= 1.01 * oracle
    assert max(rates) >= 0.9 * oracle  # an oracle that nobody comes near would say nothing


def test_the_oracle_steps_aside_where_drafts_are_worthless() -> None:
    simulation = Simulation(replace(scenario("gpu-192-weak"), rounds=100), seed=0)
    assert simulation.play(OraclePolicy(simulation)).drafting_rounds == 0


@pytest.mark.parametrize("name", ["gpu-16", "gpu-192-weak", "cpu-4", "cpu-32-chat"])
def test_adaptive_is_never_worse_than_a_fixed_choice(name: str) -> None:
    world = scenario(name)
    simulation = Simulation(world, seed=5)
    fixed = max(simulation.play(policy).tokens_per_second for policy in (OffPolicy(), FullPolicy()))
    assert simulation.play(adaptive(world, 5)).tokens_per_second >= 0.99 * fixed


def test_shares_rows_and_table() -> None:
    def run(tokens: float) -> Run:
        return Run(tokens, 10.0, 5, 10, 5, 30)

    world = coin_world()
    rows = [
        row
        for seed, ours in ((0, 90.0), (1, 70.0))
        for row in report.rows_of(
            world, seed, {"oracle": run(100.0), "off": run(50.0), "full": run(80.0), "adaptive": run(ours)}
        )
    ]
    summary = {row["policy"]: row for row in report.summaries(rows)}
    assert summary["adaptive"]["share_of_oracle"] == pytest.approx(0.8)
    assert summary["adaptive"]["lowest_share_of_oracle"] == 0.7
    assert summary["adaptive"]["ratio_to_best_fixed"] == pytest.approx(1.0)
    assert "| coins | stationary | 0.500 | 0.800 | 0.800 | 1.000 |" in report.markdown(list(summary.values()), "notes")


def test_a_machine_that_was_busy_is_believed_to_be_idle_again() -> None:
    """Costs learned while every token was dear must not keep the policy from verifying when it is cheap again."""
    world = scenario("cpu-busy-machine")
    simulation = Simulation(world, seed=2)
    best = simulation.play(OraclePolicy(simulation)).tokens_per_second
    assert simulation.play(adaptive(world, 2)).tokens_per_second >= 0.94 * best
