"""`dspark train` and `dspark train-demo`: from a target model to a bundle that serves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dspark_serving.assets import ensure_smollm2
from dspark_serving.cli.console import console, one_line_errors, report

_DEMO_EVALUATION = ("gsm8k_test", "humaneval", "chat")


def train(
    target: Annotated[Path, typer.Option(help="Checkpoint of the target model.")],
    recipes: Annotated[
        list[str] | None, typer.Argument(help="JSON recipes, or names of shipped ones; later ones win, field by field.")
    ] = None,
    algorithm: Annotated[str | None, typer.Option(help="dspark, dflash or eagle3.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A field, as in optim.steps=500.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Directory of the finished drafter [WORK/bundle].")] = None,
    work: Annotated[Path, typer.Option(help="Answers, checkpoints and logs; a second run resumes here.")] = Path(
        "runs/train"
    ),
    evaluate: Annotated[list[Path] | None, typer.Option(help="JSONL prompts to measure accepted length on.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what the run will take, and do not run it.")] = False,
    plan_seconds: Annotated[float, typer.Option(help="How long --plan measures the pace.")] = 30.0,
) -> None:
    """Train a drafter; prompt files in a recipe are relative to the current directory."""
    with one_line_errors():
        if plan:
            _plan(recipes or [], algorithm, set_ or [], target, work, plan_seconds)
        else:
            _train(recipes or [], algorithm, set_ or [], target, bundle or work / "bundle", work, evaluate or [])


def train_demo(
    bundle: Annotated[Path, typer.Option(help="Directory of the finished drafter.")] = Path(
        "runs/train-demo/smollm2-135m-dspark"
    ),
    work: Annotated[Path, typer.Option(help="Answers, checkpoints and logs.")] = Path("runs/train-demo"),
) -> None:
    """Train a DSpark drafter for SmolLM2-135M on the shipped answers (hours on two cores), in the repository's root."""
    with one_line_errors():
        target = ensure_smollm2("bf16", report=report)
        prompts = [Path("benchmarks/prompts") / f"{name}.jsonl" for name in _DEMO_EVALUATION]
        _train(["smollm2_135m"], "dspark", [], target, bundle, work, prompts)


def _plan(
    recipes: list[str], algorithm: str | None, overrides: list[str], target: Path, work: Path, seconds: float
) -> None:
    from dspark_training.plan import make_plan
    from dspark_training.recipe import load_recipe
    from dspark_training.target import Target

    loaded = Target.load(target)
    config = load_recipe(loaded, recipes, algorithm, overrides)
    for line in make_plan(config, loaded, work, seconds).lines():
        report(line)


def _train(
    recipes: list[str],
    algorithm: str | None,
    overrides: list[str],
    target: Path,
    bundle: Path,
    work: Path,
    evaluate: list[Path],
) -> None:
    # torch and transformers take seconds to import: not for every `dspark --help`
    from dspark_training.recipe import load_recipe
    from dspark_training.run import run_recipe
    from dspark_training.target import Target
    from dspark_training.trainer import StepReport

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    first = os.environ.get("RANK", "0") == "0"  # of several processes, one shows the bars
    loaded = Target.load(target)
    config = load_recipe(loaded, recipes, algorithm, overrides)
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not first) as bars:
        answers = bars.add_task("answers by the target", total=None, note="")
        steps = bars.add_task("training", total=None, note="")

        def on_answers(stage: str, done: int, total: int) -> None:
            bars.update(answers, description=stage, completed=done, total=total)

        def on_step(step: StepReport) -> None:
            note = f"loss {step.loss:.3f}  accepted length {step.accepted_length:.2f}  {step.tokens:,} tokens"
            bars.update(steps, completed=step.step, total=step.steps, note=note)

        rows = run_recipe(config, loaded, bundle, work, evaluate, on_step, on_answers)
    for row in rows:
        report(
            f"{row['dataset']}: accepted length {row['accepted_length']:.2f} (bonus token included, temperature 0), "
            f"prompt lookup {row['prompt_lookup']:.2f}"
        )
    if first:
        report(f"the drafter is in {bundle}")
