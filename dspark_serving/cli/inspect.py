"""`dspark inspect`: what a drafter is, and whether it can be served."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dspark_serving.cli.console import console, one_line_errors
from dspark_serving.drafters import DrafterSpec, check_fit, check_weights, read_spec
from dspark_serving.drafters.spec import read_json_object


def inspect(
    path: Annotated[Path, typer.Argument(help="Directory of the drafter: config.json and model.safetensors.")],
    target: Annotated[Path | None, typer.Option(help="Checkpoint directory of the target, to check the fit.")] = None,
) -> None:
    """Check a drafter's configuration and weights, and whether it belongs to a target."""
    with one_line_errors():
        spec = read_spec(path)
        check_weights(spec)
        if target is not None:
            check_fit(spec, read_json_object(target / "config.json", "the target's config.json"))
    console.print(_table(spec))
    console.print("configuration and weights agree" + (f"; it fits {target}" if target else ""), soft_wrap=True)


def _table(spec: DrafterSpec) -> Table:
    table = Table(show_header=False)
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name == "draft_token_ids":
            value = "whole vocabulary" if value is None else f"{len(value)} ids"
        table.add_row(field.name, str(value))
    return table
