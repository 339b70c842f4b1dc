"""`dspark replay`: reproduce recorded decisions, or ask what another policy would have decided."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dspark_serving.cli.console import console, one_line_errors
from dspark_serving.recording import read_recording, what_if
from dspark_serving.recording import replay as reproduce
from dspark_serving.recording.replay import ReplayReport, Tally, WhatIf
from dspark_serving.scheduler.catalog import POLICIES

_DIFFERS_EXIT = 1


def replay(
    file: Annotated[Path, typer.Argument(help="A recording (.npz).")],
    policy: Annotated[
        str | None, typer.Option(help=f"Ask what this policy would have done: {', '.join(POLICIES)}.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="For --policy threshold; default: as recorded.")
    ] = None,
) -> None:
    """Reproduce every decision of a recording bit for bit; exits with 1 at the first difference."""
    with one_line_errors():
        recording = read_recording(file)
        header = recording.header
        console.print(
            f"{len(recording.rounds)} rounds under policy {header.policy}, block size {header.gamma}, recorded "
            f"{header.reason}; plugin {header.plugin}, numpy {header.numpy}, {header.machine}",
            soft_wrap=True,
            highlight=False,
        )
        if policy is not None:
            other = what_if(recording, policy, threshold)
            console.print(_comparison(header.policy, policy, other))
            console.print(
                "Accepted drafts beyond the recorded verification are estimates from calibrated survival, and seconds "
                "are the cost model's predictions.",
                soft_wrap=True,
            )
            if other.unknown_rounds:
                console.print(
                    f"Left out: {other.unknown_rounds} rounds that had no drafts to choose from.", soft_wrap=True
                )
            return
        report = reproduce(recording)
    console.print(_verdict(report), soft_wrap=True, highlight=False)
    if report.difference is not None:
        raise typer.Exit(_DIFFERS_EXIT)


def _verdict(report: ReplayReport) -> str:
    if report.difference is None:
        return f"identical: {report.plans} plans and {report.admissions} admissions"
    index, what, recorded, replayed = report.difference
    return f"round {index} differs: {what} was {recorded}, is {replayed} ({report.plans} plans compared)"


def _comparison(recorded_name: str, other_name: str, what_if: WhatIf) -> Table:
    table = Table()
    for column in ("", f"recorded ({recorded_name})", f"what if ({other_name})"):
        table.add_column(column)
    rows: dict[str, Callable[[Tally], str]] = {
        "rounds": lambda tally: f"{tally.rounds}",
        "drafts verified": lambda tally: f"{tally.verified}",
        "drafts accepted": lambda tally: f"{tally.accepted}",
        "accepted beyond, estimated": lambda tally: f"{tally.estimated:.1f}",
        "seconds, predicted": lambda tally: f"{tally.seconds:.4f}",
        "tokens a second, predicted": lambda tally: f"{tally.tokens_per_second:.1f}",
    }
    for name, show in rows.items():
        table.add_row(name, show(what_if.recorded), show(what_if.other))
    return table
