"""The scheduler against what it chooses between: `python -m benchmarks.scheduler_sweep` (issue 3).

One server, its policy switched between runs, and SGLang's NGRAM on a second one where decoding is greedy. Both are up
at the same time: a sleeping server costs memory, not cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.subjects import DATASETS, chosen, dspark_options, ngram_arm
from dspark_serving.assets import ensure_smollm2, shipped_bundle
from dspark_serving.bench.arms import Arm, Launched, PolicyChoice
from dspark_serving.bench.plan import Settings
from dspark_serving.bench.workload import Shape
from dspark_serving.cli.bench import announce, concurrencies, measure, numbers
from dspark_serving.cli.console import one_line_errors, report

CANDIDATE = "scheduler"
RIVALS = ("off", "static", "threshold", "native")
_POLICIES = {
    "off": PolicyChoice("off"),
    "static": PolicyChoice("full"),
    "threshold": PolicyChoice("threshold", 0.3),
    "native": PolicyChoice("native"),
    CANDIDATE: PolicyChoice("adaptive"),
}
_RESULT = Path(__file__).parent / "results" / "scheduler_sweep.json"


def arms_of(target: Path, drafter: Path, max_requests: int) -> dict[str, Arm]:
    """Every arm; those with a policy share a server."""
    room = ("--max-running-requests", str(max_requests))
    shared = Launched(target, (*dspark_options(drafter), *room))
    arms = [Arm(name, shared, policy, drafter.name, "dspark") for name, policy in _POLICIES.items()]
    return {arm.name: arm for arm in (*arms, ngram_arm(target, drafter, *room))}


def main(
    arms: Annotated[str, typer.Option(help="A list; `scheduler` among them.")] = ",".join((*_POLICIES, "ngram")),
    datasets: Annotated[str, typer.Option(help="A list.")] = ",".join(DATASETS),
    concurrency: Annotated[str, typer.Option(help="Requests under way, a list.")] = "1,2,4,8,16,32",
    temperature: Annotated[str, typer.Option(help="A list.")] = "0,1",
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each point and arm.")] = 2,
    prompts: Annotated[int, typer.Option(min=1, help="Of a run, at least; never fewer than the concurrency.")] = 4,
    waves: Annotated[
        int, typer.Option(min=1, help="Requests of a run by concurrency, at least, as far as prompts go.")
    ] = 2,
    max_tokens: Annotated[int, typer.Option(min=4, help="Tokens of an answer, in the mean.")] = 32,
    time_limit: Annotated[float | None, typer.Option(min=0, help="Seconds after which no further turn begins.")] = None,
    pace: Annotated[bool, typer.Option("--pace", help="Also compare at equal pace of an unsteady machine.")] = False,
    bundle: Annotated[Path | None, typer.Option(help="A drafter; by default the shipped one.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say how long it would take.")] = False,
    output: Annotated[Path, typer.Option(help="JSON file; a table and a plot are written beside it.")] = _RESULT,
) -> None:
    """Measure the scheduler against off, static, threshold, SGLang's own planner and NGRAM; interrupted, it resumes."""
    with one_line_errors():
        loads = concurrencies(concurrency)
        target = ensure_smollm2("bf16", report=report)
        known = arms_of(target, bundle or shipped_bundle(), max(load.concurrency or 1 for load in loads))
        compared = chosen("--arms", arms, known)
        settings = Settings(
            target="smollm2-135m-instruct bf16",
            arms=tuple(compared.values()),
            datasets=tuple(chosen("--datasets", datasets, DATASETS).values()),
            temperatures=tuple(numbers("--temperature", temperature)),
            loads=loads,
            shape=Shape(prompts, max_tokens, ignore_eos=True, waves=waves),
            repetitions=repetitions,
            baseline="off" if "off" in compared else None,
            candidate=CANDIDATE,
            rivals=tuple(name for name in RIVALS if name in compared),
            together=True,
            time_limit=time_limit,
            pace=pace,
        )
        announce(settings)
        if not plan:
            notes = "`off` is plain decoding on the same server: the policy off, without drafting."
            measure("scheduler_sweep", settings, output, notes)


if __name__ == "__main__":
    typer.run(main)
