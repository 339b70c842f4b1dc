"""First figures of the served drafter: `python -m benchmarks.first_light` (issue 2, point 7).

The servers of all arms are up at the same time and one of them is asked at a time: a sleeping server costs memory, not
cores, and arms that take turns within minutes see the same machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from benchmarks.subjects import DATASETS, chosen, dspark_options, ngram_arm
from dspark_serving.assets import Dtype, ensure_smollm2, shipped_bundle
from dspark_serving.bench.arms import Arm, Launched, PolicyChoice
from dspark_serving.bench.plan import Settings
from dspark_serving.bench.workload import Shape
from dspark_serving.cli.bench import announce, concurrencies, measure
from dspark_serving.cli.console import one_line_errors, report
from dspark_serving.config import flag
from dspark_serving.errors import OptionError

BASELINE = "off"
_RESULT = Path(__file__).parent / "results" / "first_light.json"


def arms_of(target: Path, drafter: Path) -> dict[str, Arm]:
    """Every arm that can be measured."""
    options = dspark_options(drafter)
    served = Launched(target, options)
    arms = (
        Arm(BASELINE, Launched(target, (*options, flag("disable")))),  # SGLang as published, without speculation
        Arm("plain", Launched(target, ())),  # without speculation too, on this plugin's CPU parts
        Arm("dspark", served, PolicyChoice("adaptive"), drafter.name, "dspark"),  # as it is served by default
        Arm("static", served, PolicyChoice("full"), drafter.name, "dspark"),
        ngram_arm(target, drafter),
    )
    return {arm.name: arm for arm in arms}


def main(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each dataset.")] = 16,
    waves: Annotated[
        int, typer.Option(min=1, help="Requests of a run by concurrency, at least, as far as prompts go.")
    ] = 2,
    concurrency: Annotated[str, typer.Option(help="Requests under way, a list.")] = "1,2,4,8",
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each point.")] = 2,
    arms: Annotated[str, typer.Option(help="A list of: off, plain, dspark, static, ngram.")] = "off,plain,dspark,ngram",
    datasets: Annotated[str, typer.Option(help="A list.")] = ",".join(DATASETS),
    max_tokens: Annotated[int, typer.Option(min=4, help="Length at which an answer is cut.")] = 128,
    dtype: Annotated[str, typer.Option(help="Of the target: bf16 or fp32.")] = "bf16",
    bundle: Annotated[Path | None, typer.Option(help="A drafter; by default the shipped one.")] = None,
    output: Annotated[Path, typer.Option(help="JSON file; a table and a plot are written beside it.")] = _RESULT,
) -> None:
    """Measure tokens a second and accepted length with and without speculation, arms interleaved."""
    with one_line_errors():
        if dtype not in ("bf16", "fp32"):
            raise OptionError(f"--dtype {dtype}", expected="bf16 or fp32", fix="Name one of them.")
        drafter = bundle or shipped_bundle()
        target = ensure_smollm2(cast(Dtype, dtype), report=report)
        settings = Settings(
            target=f"smollm2-135m-instruct {dtype}",
            arms=tuple(chosen("--arms", arms, arms_of(target, drafter)).values()),
            datasets=tuple(chosen("--datasets", datasets, DATASETS).values()),
            temperatures=(0.0,),
            loads=concurrencies(concurrency),
            shape=Shape(prompts, max_tokens, ignore_eos=False, waves=waves),
            repetitions=repetitions,
            baseline=BASELINE,
            candidate=None,
            together=True,
        )
        announce(settings)
        notes = "`off` is SGLang's own decoding, `plain` the same without speculation on this plugin's CPU parts."
        measure("first_light", settings, output, notes)


if __name__ == "__main__":
    typer.run(main)
