"""The end of a training run: calibration on held-out answers, the card, the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dspark_training.bundle.calibrate import fit_and_score
from dspark_training.bundle.card import quality_section, write_card
from dspark_training.bundle.export import Confidence, export_bundle
from dspark_training.bundle.rounds import drawn_at, held_out_rounds
from dspark_training.config import RunConfig
from dspark_training.data.store import Sample
from dspark_training.data.vocab import DraftVocab
from dspark_training.features.source import FeatureSource
from dspark_training.models.setup import Drafter
from dspark_training.target import Target


def finish_bundle(
    directory: Path,
    config: RunConfig,
    drafter: Drafter,
    target: Target,
    vocab: DraftVocab,
    scale_M: Tensor,
    source: FeatureSource,
    held_out: Sequence[Sample],
    facts: dict[str, Any],
    provenance: dict[str, Any],
) -> None:
    """Calibrate a trained drafter and write everything that it is served with, replacing what was there.

    Args:
        scale_M: feature scale of training, which `source` applies and the bundle's `fc` takes over.
        held_out: answers that were not trained on; too few of the target's own, drawn at a known temperature (see
            `drawn_at`), leave the drafter uncalibrated.
        facts: for the card, see `write_card`.
        provenance: written to training.json; `earlier` runs of the weights among it.

    Raises:
        CheckpointError, OptionError: see `export_bundle`.
    """
    usable = [sample for sample in held_out if sample.has_anchor and drawn_at(sample) is not None]
    fitted = fit_and_score(held_out_rounds(target, drafter, source, vocab, usable)) if usable else None
    if fitted is not None:
        facts = facts | {"confidence": quality_section(fitted, len(usable))}
    export_bundle(
        directory,
        drafter,
        target,
        config.drafter,
        vocab,
        scale_M,
        write_card(config, facts, provenance["earlier"]),
        provenance,
        Confidence() if fitted is None else fitted.confidence,
    )
