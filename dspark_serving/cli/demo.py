"""`dspark demo`: one comparison, with the shipped drafter and without speculation."""

from __future__ import annotations

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from dspark_serving.cli.console import console, one_line_errors, report
from dspark_serving.demo import PROMPTS, Arm, Comparison, run_demo


class DemoDtype(StrEnum):
    BF16 = "bf16"
    FP32 = "fp32"


def demo(
    dtype: Annotated[DemoDtype, typer.Option(help="fp32 is exact; bf16 is faster and may flip near-ties.")] = (
        DemoDtype.FP32
    ),
    bundle: Annotated[Path | None, typer.Option(help="A drafter bundle; by default the shipped one.")] = None,
) -> None:
    """Serve a real model with a DSpark drafter, chat with it, and compare with the same server without speculation."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, which ends the server
    with one_line_errors():
        comparison = run_demo(dtype.value, bundle=bundle, report=report)
    _show(comparison)
    if dtype is DemoDtype.FP32 and comparison.equal_texts < len(PROMPTS):
        raise typer.Exit(1)


def _show(comparison: Comparison) -> None:
    console.print(Panel(escape(PROMPTS[0]), title="asked", title_align="left"))
    console.print(Panel(escape(comparison.dspark.answers[0].text), title="answered with DSpark", title_align="left"))
    table = Table("", "tokens/s", "accepted length (bonus token included)", "same text")
    table.add_row(*_figures(comparison.dspark), f"{comparison.equal_texts} of {len(PROMPTS)}")
    table.add_row(*_figures(comparison.plain), "")
    console.print(table)
    ratio = comparison.dspark.tokens_per_second / comparison.plain.tokens_per_second
    console.print(f"{ratio:.2f} times the speed, {len(PROMPTS)} questions, one at a time, temperature 0")


def _figures(arm: Arm) -> tuple[str, str, str]:
    accepted = "1 (no speculation)" if arm.accepted_length is None else f"{arm.accepted_length:.2f}"
    return arm.name, f"{arm.tokens_per_second:.1f}", accepted
