"""Every policy in worlds of known truth, against an oracle: `python -m benchmarks.simulator`.

The worlds are in `dspark_serving/simulator/scenarios.py`. All policies but the oracle start as a server does: with a
noisy profile of the machine that is wrong for one batch size, and with an uncalibrated drafter. SGLang's planner gets a
table from the true costs instead, as they are at the start.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from dspark_serving.bench.results import ResultFile, Row
from dspark_serving.cli.console import one_line_errors, report
from dspark_serving.errors import OptionError
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.catalog import PolicyParts, make_policy
from dspark_serving.scheduler.cost import CostModel
from dspark_serving.scheduler.round import Policy
from dspark_serving.sglang_adapter.native_budget import NativeBudgetPolicy
from dspark_serving.simulator import report as shares
from dspark_serving.simulator.oracle import OraclePolicy
from dspark_serving.simulator.profile import measure
from dspark_serving.simulator.runner import Simulation
from dspark_serving.simulator.scenarios import SCENARIOS
from dspark_serving.simulator.worlds import World

_RESULT = Path(__file__).parent / "results" / "simulator.json"
_THRESHOLD = 0.3
_NOTES = (
    "Tokens a second of all requests as a share of an oracle that knows true costs and survivals; prefill is left out, "
    f"each policy's warm-up is counted. threshold at {_THRESHOLD}. native: SGLang's budget function, lag and ranking, "
    "its table read off the true costs (draft pass included) at the start. The other policies that need costs start "
    "from a noisy profile that is wrong for one batch size. gpu worlds tell of rounds one round late, as overlap does."
)


def from_catalog(name: str) -> Callable[[Simulation, int], Policy]:
    """A policy as a server makes it."""

    def make(simulation: Simulation, seed: int) -> Policy:
        world = simulation.world
        cost = CostModel.fit(measure(world, seed), world.machine.tiers)
        parts = PolicyParts(world.gamma, world.slots, cost, Calibration.identity(world.gamma), _THRESHOLD, 0.0)
        return make_policy(name, parts)

    return make


def native(simulation: Simulation, seed: int) -> Policy:
    """SGLang's planner with a table of the true costs."""
    world = simulation.world
    return NativeBudgetPolicy(
        world.gamma, world.slots, world.machine, context=(world.prompt[0] + world.prompt[1]) // 2, lag=1 + world.lag
    )


POLICIES: dict[str, Callable[[Simulation, int], Policy]] = {
    "oracle": lambda simulation, seed: OraclePolicy(simulation),
    "off": from_catalog("off"),
    "full": from_catalog("full"),
    "threshold": from_catalog("threshold"),
    "algorithm1": from_catalog("algorithm1"),
    "native": native,
    "adaptive": from_catalog("adaptive"),
}


def chosen_worlds(names: str) -> list[World]:
    """Scenarios whose name contains one of the comma-separated parts; all for an empty text.

    Raises:
        OptionError: there is none.
    """
    worlds = [world for world in SCENARIOS if any(part in world.name for part in names.split(","))]
    if not worlds:
        known = ", ".join(world.name for world in SCENARIOS)
        raise OptionError(f"no scenario is called {names!r}", expected=f"parts of {known}", fix="Name some of them.")
    return worlds


def main(
    seeds: Annotated[str, typer.Option(help="Comma-separated; of texts, noise and the profile's errors.")] = "0,1",
    scenarios: Annotated[str, typer.Option(help="Parts of scenario names, comma-separated; empty: all.")] = "",
    output: Annotated[Path, typer.Option(help="JSON file; a table is written beside it.")] = _RESULT,
) -> None:
    """Let every policy play every scenario."""
    with one_line_errors():
        torch.set_num_threads(1)
        result = ResultFile("simulator", output)
        rows: list[Row] = []
        worlds = chosen_worlds(scenarios)
        for world in worlds:
            for seed in (int(part) for part in seeds.split(",")):
                simulation = Simulation(world, seed)
                runs = {name: simulation.play(make(simulation, seed)) for name, make in POLICIES.items()}
                rows += shares.rows_of(world, seed, runs)
                found = ", ".join(f"{row['policy']} {row['share_of_oracle']:.3f}" for row in rows[-len(runs) + 1 :])
                report(f"{world.name} seed {seed}: {found}")
        summary = shares.summaries(rows)
        result.write([*rows, *summary], _NOTES)
        output.with_suffix(".md").write_text(shares.markdown(summary, _NOTES))
        report(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
