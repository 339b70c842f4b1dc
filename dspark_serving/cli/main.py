"""The `dspark` command."""

from __future__ import annotations

import typer

app = typer.Typer(name="dspark", help=__doc__, no_args_is_help=True)
