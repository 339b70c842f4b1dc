"""`dspark bundle`: drafters with everything that they are served with: imported, completed, checked, exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dspark_serving.cli.console import console, one_line_errors, report
from dspark_serving.errors import OptionError

if TYPE_CHECKING:
    from dspark_training.bundle.calibrate import FittedConfidence

bundle_app = typer.Typer(no_args_is_help=True, help="Drafters as directories that serve as they are.")

_Bundle = Annotated[Path, typer.Argument(help="Directory of the bundle.")]
_Target = Annotated[Path, typer.Option(help="Checkpoint directory of the target.")]


@bundle_app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A published drafter, of any format that is served.")],
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle to make.")],
    target: _Target,
) -> None:
    """Make a bundle of a published drafter, without its copies of the target's weights."""
    with one_line_errors():
        from dspark_training.bundle.imports import import_checkpoint  # torch and transformers take seconds to import
        from dspark_training.target import Target

        spec = import_checkpoint(source, Target.load(target), bundle)
    report(f"{bundle}: a {spec.family} drafter of {spec.gamma} tokens a round")
    kept = [name for name, own in (("embedding", spec.own_embedding), ("output head", spec.own_head)) if own]
    report(f"with its own {' and '.join(kept)}" if kept else "embedding and output head are the target's")


@bundle_app.command()
def calibrate(
    bundle: _Bundle,
    target: _Target,
    prompts: Annotated[Path, typer.Option(help="JSONL prompts that were not trained on.")],
    limit: Annotated[int, typer.Option(min=1, help="How many of them.")] = 100,
    temperature: Annotated[list[float] | None, typer.Option(min=0.0, help="Of the answers; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    dtype: Annotated[str, typer.Option(help="Of the target: bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Fit the confidences of a bundle's drafter to rounds over answers of its target, and keep them in it."""
    with one_line_errors():
        fitted = _calibrate(
            bundle, target, prompts, limit, tuple(temperature or (0.0, 0.8)), max_new_tokens, batch_size, dtype
        )
    table = Table(title="survival up to each position, on answers that it was not fitted to")
    for column in ("position", "labels", "ECE", "Brier", "AUROC"):
        table.add_column(column, justify="right")
    for position, (old, new) in enumerate(zip(fitted.before, fitted.after, strict=True), start=1):
        scores = (f"{was:.4f} -> {now:.4f}" for was, now in zip(old[1:], new[1:], strict=True))
        table.add_row(str(position), str(new.labels), *scores)
    console.print(table)


def _calibrate(
    bundle: Path,
    target: Path,
    prompts: Path,
    limit: int,
    temperatures: tuple[float, ...],
    max_new_tokens: int,
    batch_size: int,
    dtype: str,
) -> FittedConfidence:
    import torch
    from dspark_training.bundle.amend import calibrate_bundle
    from dspark_training.data.prompts import read_prompts
    from dspark_training.target import Target

    types = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in types:
        raise OptionError(f"--dtype {dtype}", expected=f"one of {', '.join(types)}", fix="Correct the option.")
    return calibrate_bundle(
        bundle,
        Target.load(target, types[dtype]),
        read_prompts(prompts)[:limit],
        temperatures=temperatures,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )


@bundle_app.command()
def costs(bundle: _Bundle) -> None:
    """Put the step times that servers on this machine measured with this drafter into the bundle."""
    with one_line_errors():
        from dspark_training.bundle.amend import add_cost_tables

        names = add_cost_tables(bundle)
    report(f"{bundle} carries {', '.join(names)}")


@bundle_app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A bundle, or a drafter of any format.")],
    directory: Annotated[Path, typer.Argument(help="Directory to write.")],
    format: Annotated[str, typer.Option(help="deepspec or specforge: both load in SGLang without this plugin.")],
    target: Annotated[Path | None, typer.Option(help="The target's checkpoint; DeepSpec's format has copies.")] = None,
    whole_vocabulary: Annotated[
        bool, typer.Option("--whole-vocabulary", help="Give up a reduced draft vocabulary, which those do not know.")
    ] = False,
) -> None:
    """Write a drafter in another project's format."""
    with one_line_errors():
        from dspark_training.bundle.foreign import export_foreign, foreign_format
        from dspark_training.target import Target

        loaded = None if target is None else Target.load(target)
        spec = export_foreign(source, directory, foreign_format(format), loaded, whole_vocabulary=whole_vocabulary)
    report(f"{directory}: {spec.architecture}")


@bundle_app.command()
def verify(bundle: _Bundle) -> None:
    """Compare every file of a bundle with its manifest, and its weights with its config.json."""
    with one_line_errors():
        from dspark_training.bundle.manifest import check_manifest

        from dspark_serving.drafters import check_weights, read_spec

        check_manifest(bundle)
        check_weights(read_spec(bundle))
    report(f"{bundle} is as it was made")
