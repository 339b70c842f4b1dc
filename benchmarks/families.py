"""The three drafter families side by side in the real server: `python -m benchmarks.families` (issue 5).

One server a family, all up at the same time and one of them asked at a time. Each family is measured with every drafted
token verified and under the scheduler; its gain over its own full verification is what its confidences are worth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.subjects import DATASETS, chosen, dspark_options
from dspark_serving.assets import ensure_smollm2
from dspark_serving.bench.arms import Arm, Launched, PolicyChoice
from dspark_serving.bench.plan import Settings
from dspark_serving.bench.workload import Shape
from dspark_serving.cli.bench import announce, concurrencies, measure, numbers
from dspark_serving.cli.console import one_line_errors, report
from dspark_serving.drafters import read_spec

_BUNDLES = Path(__file__).resolve().parents[1] / "examples" / "bundles"
_RESULT = Path(__file__).parent / "results" / "families.json"
_POLICIES = {"full": PolicyChoice("full"), "adaptive": PolicyChoice("adaptive")}


def arms_of(target: Path, drafters: list[Path], max_requests: int) -> list[Arm]:
    """`off` on the first drafter's server, then every family with each policy."""
    room = ("--max-running-requests", str(max_requests))
    servers = {drafter: Launched(target, (*dspark_options(drafter), *room)) for drafter in drafters}
    arms = [Arm("off", servers[drafters[0]], PolicyChoice("off"))]
    for drafter, server in servers.items():
        family = read_spec(drafter).family
        arms += [Arm(f"{family}-{name}", server, choice, drafter.name, family) for name, choice in _POLICIES.items()]
    return arms


def main(
    datasets: Annotated[str, typer.Option(help="A list.")] = ",".join(DATASETS),
    concurrency: Annotated[str, typer.Option(help="Requests under way, a list.")] = "1,16",
    temperature: Annotated[str, typer.Option(help="A list.")] = "0",
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each point and arm.")] = 2,
    prompts: Annotated[int, typer.Option(min=1, help="Of a run, at least; never fewer than the concurrency.")] = 4,
    waves: Annotated[
        int, typer.Option(min=1, help="Requests of a run by concurrency, at least, as far as prompts go.")
    ] = 2,
    max_tokens: Annotated[int, typer.Option(min=4, help="Tokens of an answer, in the mean.")] = 64,
    bundles: Annotated[Path, typer.Option(help="Directory with a drafter of each family.")] = _BUNDLES,
    pace: Annotated[bool, typer.Option("--pace", help="Also tell how fast an unsteady machine was.")] = False,
    output: Annotated[Path, typer.Option(help="JSON file; a table and a plot are written beside it.")] = _RESULT,
) -> None:
    """Measure drafters of all families with and without the scheduler's truncation; interrupted, it resumes."""
    with one_line_errors():
        loads = concurrencies(concurrency)
        target = ensure_smollm2("bf16", report=report)
        drafters = sorted(bundles.iterdir(), key=lambda path: path.name)
        settings = Settings(
            target="smollm2-135m-instruct bf16",
            arms=tuple(arms_of(target, drafters, max(load.concurrency or 1 for load in loads))),
            datasets=tuple(chosen("--datasets", datasets, DATASETS).values()),
            temperatures=tuple(numbers("--temperature", temperature)),
            loads=loads,
            shape=Shape(prompts, max_tokens, ignore_eos=True, waves=waves),
            repetitions=repetitions,
            baseline="off",
            candidate=None,
            together=True,
            pace=pace,
        )
        announce(settings)
        notes = "`off` is plain decoding on the first family's server; FAMILY-full verifies every draft."
        measure("families", settings, output, notes)


if __name__ == "__main__":
    typer.run(main)
