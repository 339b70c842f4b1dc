"""`dspark train` and `dspark train-demo`: from a target model to a bundle that serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dspark_serving.assets import ensure_smollm2
from dspark_serving.cli.console import console, one_line_errors, report

_DEMO_EVALUATION = ("gsm8k_test", "humaneval", "chat")


def train(
    recipe: Annotated[Path, typer.Argument(help="JSON recipe: data, drafter, optim.")],
    target: Annotated[Path, typer.Option(help="Checkpoint of the target model.")],
    bundle: Annotated[Path, typer.Option(help="Directory of the finished drafter.")],
    work: Annotated[Path, typer.Option(help="Answers, checkpoints and logs; a second run resumes here.")],
    evaluate: Annotated[list[Path] | None, typer.Option(help="JSONL prompts to measure accepted length on.")] = None,
) -> None:
    """Train a drafter in one process; prompt files in a recipe are relative to the current directory."""
    with one_line_errors():
        _train(recipe, target, bundle, work, evaluate or [])


def train_demo(
    bundle: Annotated[Path, typer.Option(help="Directory of the finished drafter.")] = Path(
        "runs/train-demo/smollm2-135m-dspark"
    ),
    work: Annotated[Path, typer.Option(help="Answers, checkpoints and logs.")] = Path("runs/train-demo"),
) -> None:
    """Train the shipped SmolLM2-135M drafter again (hours on two cores); run it in the repository's root."""
    from dspark_training.run import DEMO_RECIPE

    with one_line_errors():
        target = ensure_smollm2("fp32", report=report)
        prompts = [Path("benchmarks/prompts") / f"{name}.jsonl" for name in _DEMO_EVALUATION]
        _train(DEMO_RECIPE, target, bundle, work, prompts)


def _train(recipe: Path, target: Path, bundle: Path, work: Path, evaluate: list[Path]) -> None:
    # torch and transformers take seconds to import: not for every `dspark --help`
    from dspark_training.run import run_recipe
    from dspark_training.trainer import StepReport

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bars:
        answers = bars.add_task("answers by the target", total=None, note="")
        steps = bars.add_task("training", total=None, note="")

        def on_answers(stage: str, done: int, total: int) -> None:
            bars.update(answers, description=stage, completed=done, total=total)

        def on_step(step: StepReport) -> None:
            note = f"loss {step.loss:.3f}  accepted length {step.accepted_length:.2f}  {step.tokens:,} tokens"
            bars.update(steps, completed=step.step, total=step.steps, note=note)

        rows = run_recipe(recipe, target, bundle, work, evaluate, on_step, on_answers)
    for row in rows:
        report(
            f"{row['dataset']}: accepted length {row['accepted_length']:.2f} (bonus token included, temperature 0), "
            f"prompt lookup {row['prompt_lookup']:.2f}"
        )
    report(f"the drafter is in {bundle}")
