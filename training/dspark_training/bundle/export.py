"""Bundles: a drafter in this project's own format, with everything that it is served with; written, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark_serving.drafters import DrafterSpec, check_weights, read_spec
from dspark_serving.drafters.readers.deepspec import VOCABULARY_FILE, vocabulary_text
from dspark_serving.drafters.readers.own import canonical_config
from dspark_serving.drafters.weights import weights_of
from dspark_serving.errors import CheckpointError
from dspark_serving.scheduler import calibration as temperatures
from dspark_serving.scheduler import survival_map as maps
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.survival_map import SurvivalMap
from dspark_training.bundle.lineage import PROVENANCE
from dspark_training.bundle.manifest import check_drafter_files
from dspark_training.bundle.network import describe_drafter, network_for
from dspark_training.bundle.publish import replacing
from dspark_training.config import DrafterShape
from dspark_training.data.vocab import DraftVocab
from dspark_training.models.setup import Drafter
from dspark_training.target import Target

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Confidence(NamedTuple):
    """What was fitted to held-out rounds; either may be missing, and serving then takes its default."""

    calibration: Calibration | None = None
    survival_map: SurvivalMap | None = None  # judges drafts in place of a confidence head


def export_bundle(
    directory: Path,
    drafter: Drafter,
    target: Target,
    shape: DrafterShape,
    vocab: DraftVocab,
    scale_M: Tensor,
    card: str,
    provenance: dict[str, Any],
    confidence: Confidence = Confidence(),
) -> None:
    """Write a trained drafter of any family as a bundle, replacing what was there.

    Args:
        scale_M: feature scale of training, folded into `fc` here.
        card: text of README.md.
        provenance: written to training.json.
        confidence: what was fitted to held-out rounds.

    Raises:
        CheckpointError: a weight is not finite, or the directory cannot be written; what was there is intact.
        OptionError: the directory holds something else than a bundle.
    """
    weights = {name: tensor.detach().clone() for name, tensor in drafter.state_dict().items()}
    weights["fc.weight"] = weights["fc.weight"] * scale_M
    spec = describe_drafter(drafter, target, shape.target_layer_ids, vocab, directory)
    files = {PROVENANCE: json.dumps(provenance, indent=2) + "\n", "README.md": card}
    write_bundle(directory, spec, weights, files, confidence)


def write_bundle(
    directory: Path,
    spec: DrafterSpec,
    weights: Mapping[str, Tensor],
    files: Mapping[str, str],
    confidence: Confidence = Confidence(),
) -> None:
    """Write a drafter's files, check them as serving would, and put them in place of `directory`.

    Args:
        spec: its description, in the own format.
        weights: by canonical name; stored in bfloat16.
        files: further text files by name.

    Raises:
        CheckpointError: weights and description disagree, a weight is not finite, or the disk is full.
        OptionError: the directory holds something else than a bundle.
    """
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    with replacing(directory) as partial:
        save_file(stored, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(canonical_config(spec), indent=2) + "\n")
        if spec.draft_token_ids is not None:
            (partial / VOCABULARY_FILE).write_text(vocabulary_text(spec.draft_token_ids))
        for name, text in files.items():
            (partial / name).write_text(text)
        save_confidence(partial, confidence)
        check_weights(read_spec(partial))


def save_confidence(directory: Path, confidence: Confidence) -> None:
    """Write what was fitted where serving finds it, beside the weights; what was there before goes."""
    for fitted, name in (
        (confidence.calibration, temperatures.FILE_NAME),
        (confidence.survival_map, maps.FILE_NAME),
    ):
        (directory / name).unlink(missing_ok=True)
        if fitted is not None:
            fitted.save(directory / name)


def load_bundle(
    directory: Path, dtype: torch.dtype = torch.float32, target: Target | None = None
) -> tuple[Drafter, DrafterSpec]:
    """The drafter of a directory of any format in plain torch, in evaluation mode, and its description.

    Args:
        target: to check that it scales embeddings and caps logits as the drafter was trained with.

    Raises:
        CheckpointError: a file is missing, damaged or not what the manifest says; config.json contradicts the weights;
            or the networks of this package cannot express the drafter (names the reasons).
    """
    check_drafter_files(directory)
    spec = read_spec(directory)
    drafter = network_for(spec)
    check_weights(spec)
    if target is not None:
        _check_scales(spec, target)
    drafter.load_state_dict(weights_of(spec))
    return drafter.to(dtype).eval(), spec


def _check_scales(spec: DrafterSpec, target: Target) -> None:
    ours = (spec.embed_scale, spec.final_logit_softcapping or 0.0)
    theirs = (target.embed_scale, getattr(target.config, "final_logit_softcapping", None) or 0.0)
    if not torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=0.01):
        raise CheckpointError(
            f"the drafter {spec.path} scales embeddings by {ours[0]:g} and caps logits at {ours[1]:g}",
            expected=f"the target's {theirs[0]:g} and {theirs[1]:g} (0: no cap)",
            fix="Use a drafter that was trained for this target.",
        )
