"""What a finished bundle can be given later: a calibration, and cost tables of the machines it is served on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dspark_serving.assets.store import cache_root
from dspark_serving.drafters import make_view, read_spec
from dspark_serving.errors import DataError, OptionError
from dspark_serving.scheduler.cost_table import COST_DIRECTORY, checkpoint_identity, tables_of
from dspark_training.bundle.calibrate import FittedConfidence, answered, fit_and_score
from dspark_training.bundle.card import QUALITY_TITLE, quality_section
from dspark_training.bundle.export import load_bundle, save_confidence
from dspark_training.bundle.manifest import MANIFEST
from dspark_training.bundle.publish import replacing
from dspark_training.bundle.rounds import held_out_rounds
from dspark_training.data.conversation import Prompt
from dspark_training.data.vocab import DraftVocab
from dspark_training.features.source import OnlineFeatures
from dspark_training.target import Target

CARD = "README.md"


@contextmanager
def amending(directory: Path) -> Iterator[Path]:
    """Yield a copy of a bundle to change, which takes its place with a new manifest on leaving.

    Raises:
        OptionError: it is no bundle.
        CheckpointError: as `replacing`.
    """
    if not (directory / MANIFEST).is_file():
        raise OptionError(
            f"{directory} is no bundle: it has no {MANIFEST}",
            expected="a directory made by `dspark train` or `dspark bundle import`",
            fix="Import the drafter first.",
        )
    with replacing(directory) as partial:
        shutil.copytree(directory, partial, dirs_exist_ok=True)
        yield partial


def calibrate_bundle(
    directory: Path,
    target: Target,
    prompts: Sequence[Prompt],
    *,
    temperatures: Sequence[float],
    max_new_tokens: int,
    batch_size: int,
) -> FittedConfidence:
    """Let the target answer prompts at each temperature, walk the drafter over the answers and keep what is fitted.

    Raises:
        CheckpointError: the bundle cannot be read, or its network cannot be run here.
        DataError: too few rounds.
        OptionError: it is no bundle.
    """
    drafter, spec = load_bundle(directory, target=target)
    drafter.to(target.device)
    vocab = DraftVocab(spec.draft_token_ids or range(spec.vocab_size), spec.vocab_size, target.device)
    samples = [
        sample
        for heat in temperatures
        for sample in answered(target, prompts, heat, max_new_tokens=max_new_tokens, batch_size=batch_size)
    ]
    source = OnlineFeatures(target, spec.target_layer_ids)
    fitted = fit_and_score(held_out_rounds(target, drafter, source, vocab, samples)) if samples else None
    if fitted is None:
        raise DataError(
            f"{len(samples)} answers give too few rounds", expected="some dozens of answers", fix="Give more prompts."
        )
    with amending(directory) as partial:
        save_confidence(partial, fitted.confidence)
        card = partial / CARD
        text = card.read_text() if card.is_file() else ""
        card.write_text(text.split(QUALITY_TITLE)[0] + quality_section(fitted, len(samples)))
    return fitted


def add_cost_tables(directory: Path) -> list[str]:
    """Copy the step times that servers on this machine measured with this drafter into the bundle; their file names.

    A server with the same engine, model and device starts from them where its own cache has none, after trying them.

    Raises:
        DataError: no server with this drafter has kept step times here.
        OptionError: it is no bundle.
    """
    root = cache_root()
    identity = checkpoint_identity(make_view(read_spec(directory), root))
    tables = tables_of(root / COST_DIRECTORY, identity)
    if not tables:
        raise DataError(
            f"no server on this machine has measured its step times with {directory}",
            expected=f"tables in {root / COST_DIRECTORY}",
            fix="Serve the bundle once, then try again.",
        )
    with amending(directory) as partial:
        (partial / COST_DIRECTORY).mkdir(exist_ok=True)
        for table in tables:
            shutil.copyfile(table, partial / COST_DIRECTORY / table.name)
    return [table.name for table in tables]
