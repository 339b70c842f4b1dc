"""From a checkpoint of any format that is read to a bundle: our names, bfloat16, no copies of the target's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dspark_serving.drafters import DrafterSpec, check_fit, check_weights, read_spec
from dspark_serving.drafters.files import open_weights, tensor, weight_files
from dspark_serving.drafters.readers import own
from dspark_serving.drafters.spec import read_json_object
from dspark_serving.drafters.weights import TARGET_COPIES, expected_shapes, weights_of
from dspark_training.bundle.card import import_card
from dspark_training.bundle.export import write_bundle
from dspark_training.bundle.network import target_tables
from dspark_training.target import Target


def import_checkpoint(source: Path, target: Target, directory: Path) -> DrafterSpec:
    """Make a bundle of a published drafter.

    Copies of the target's embedding and output head are dropped when they equal the target's, and kept as the
    drafter's own when they do not: then the drafter was trained beside other weights than this target's.

    Returns:
        The bundle's description; `own_head` and `own_embedding` say what was kept.

    Raises:
        CheckpointError: the drafter cannot be read, is damaged or does not fit the target.
        OptionError: `directory` holds something else than a bundle.
    """
    target_path = Path(target.model.name_or_path)
    target_config = read_json_object(target_path / "config.json", "the target's config.json")
    original = check_fit(read_spec(source), target_config, target_path)
    check_weights(original)
    weights = weights_of(original)
    kept = _differing_copies(original, target)
    spec = replace(
        original,
        path=directory,
        format=own.FORMAT,
        dtype="bfloat16",
        own_embedding=original.own_embedding or "embed_tokens.weight" in kept,
        own_head=original.own_head or "lm_head.weight" in kept,
    )
    card = import_card(spec, original, sorted(kept))
    write_bundle(directory, spec, weights | kept, {"README.md": card})
    return read_spec(directory)


def _differing_copies(spec: DrafterSpec, target: Target) -> dict[str, Tensor]:
    """The checkpoint's copies of the target's embedding and head that are no copies; by canonical name."""
    kept = {}
    tables, loaded = target_tables(target), expected_shapes(spec)
    for path in weight_files(spec.path):
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118
                bare = name.removeprefix("model.")
                if bare in TARGET_COPIES and bare not in loaded:
                    found = tensor(file, path, name)
                    if not _equal(found, tables[bare]):
                        kept[bare] = found
    return kept


def _equal(copy: Tensor, original: Tensor) -> bool:
    """In the coarser of both types: either may have been rounded since."""
    coarser = min(copy.dtype, original.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    return copy.shape == original.shape and torch.equal(copy.to(coarser), original.to(coarser))
