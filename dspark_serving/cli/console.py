"""What every command shares: the console, and errors as one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from dspark_serving.errors import DsparkError, EnvironmentMismatchError

console = Console()
_errors = Console(stderr=True)
_USAGE_EXIT = 2


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Show a DsparkError as one red line and exit with code 2; any other exception is a bug and keeps its traceback.

    A package that the training package imports and that is not installed is such an error too.
    """
    try:
        with _missing_packages():
            yield
    except DsparkError as error:
        _errors.print(f"[bold red]error:[/] {escape(' '.join(str(error).split()))}", soft_wrap=True, highlight=False)
        raise typer.Exit(_USAGE_EXIT) from error


@contextmanager
def _missing_packages() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        asking = str(frames[-1].f_globals.get("__name__"))
        if package.startswith("dspark_") or not asking.startswith("dspark_training."):
            raise
        raise EnvironmentMismatchError(
            f"the package {package} is not installed",
            expected="the packages that training needs",
            fix="Run `pip install 'dspark-serving[train]'`.",
        ) from error


def report(step: str) -> None:
    """Say what is being done."""
    console.print(f"[dim]·[/] {escape(step)}", soft_wrap=True, highlight=False)
