"""`dspark inspect`: what a drafter is, and whether it can be served."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dspark_serving.cli.console import console, one_line_errors
from dspark_serving.drafters import DrafterSpec, read_spec
from dspark_serving.drafters.fit import complete, fit_problems
from dspark_serving.drafters.spec import read_json_object
from dspark_serving.drafters.weights import expected_shapes, weight_problems
from dspark_serving.errors import CheckpointError

_UNUSABLE_EXIT = 1
# How a field is shown when its value says little.
_ABSENT = {
    "draft_token_ids": "whole vocabulary",
    "num_target_layers": "not said",
    "mask_token_id": "none: drafts token by token",
    "final_logit_softcapping": "none",
    "sliding_window": "none",
    "is_causal": "in windowed layers only",
}


def inspect(
    path: Annotated[Path, typer.Argument(help="Directory of the drafter: config.json and model.safetensors.")],
    target: Annotated[Path | None, typer.Option(help="Checkpoint directory of the target, to check the fit.")] = None,
) -> None:
    """Describe a drafter of any published format, and say whether it can be served, and why not.

    Exits with 0 when it can, with 1 when weights or target do not agree with it, with 2 when it cannot be read.
    """
    with one_line_errors():
        spec = read_spec(path)
        problems = []
        if target is not None:
            target_config = read_json_object(target / "config.json", "the target's config.json")
            problems = fit_problems(spec, target_config, target)
            spec = spec if problems else complete(spec, target_config)
    problems += _weight_problems(spec) + _file_problems(path)
    console.print(_table(spec))
    for problem in problems:
        console.print(f"[red]✗[/] {escape(problem)}", soft_wrap=True, highlight=False)
    if problems:
        console.print(f"cannot be served: {len(problems)} problem{'s' if len(problems) > 1 else ''}", soft_wrap=True)
        raise typer.Exit(_UNUSABLE_EXIT)
    fits = f"; it fits {target}" if target else "; --target checks the fit"
    console.print(
        f"configuration and {len(expected_shapes(spec))} weights agree{fits}", soft_wrap=True, highlight=False
    )


def _weight_problems(spec: DrafterSpec) -> list[str]:
    try:
        return weight_problems(spec)
    except CheckpointError as error:  # no weights that can be read at all
        return [" ".join(str(error).split())]


def _file_problems(path: Path) -> list[str]:
    from dspark_training.bundle.manifest import drafter_problems

    with one_line_errors():
        return drafter_problems(path)


def _table(spec: DrafterSpec) -> Table:
    table = Table(show_header=False)
    for field in fields(spec):
        table.add_row(field.name, escape(_shown(spec, field.name)))
    return table


def _shown(spec: DrafterSpec, name: str) -> str:
    value = getattr(spec, name)
    if value is None:
        return _ABSENT.get(name, "none")
    if name == "draft_token_ids":
        return f"{len(value)} ids"
    if name == "target_layer_ids":
        return ", ".join(map(str, value)) or "EAGLE-3's default for the target's depth"
    if name == "rope":
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)
