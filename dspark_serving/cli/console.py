"""What every command shares: the console, and errors as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from dspark_serving.errors import DsparkError

console = Console()
_errors = Console(stderr=True)
_USAGE_EXIT = 2


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Show a DsparkError as one red line and exit with code 2; any other exception is a bug and keeps its traceback."""
    try:
        yield
    except DsparkError as error:
        _errors.print(f"[bold red]error:[/] {escape(' '.join(str(error).split()))}", soft_wrap=True, highlight=False)
        raise typer.Exit(_USAGE_EXIT) from error


def report(step: str) -> None:
    """Say what is being done."""
    console.print(f"[dim]·[/] {escape(step)}", soft_wrap=True, highlight=False)
