"""The readers by format, and which of them reads a directory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from dspark_serving.drafters.fields import Fields
from dspark_serving.drafters.readers import deepspec, eagle3, own, specforge, speculators, zlab
from dspark_serving.drafters.readers.reader import Reader
from dspark_serving.drafters.spec import DrafterSpec, ascending_ids
from dspark_serving.drafters.unserved import refuse_unserved
from dspark_serving.errors import CheckpointError

logger = logging.getLogger(__name__)

# In this order: SpecForge's DFlash drafters with its own fields are no z-lab ones.
READERS: dict[str, Reader] = {
    module.READER.format: module.READER for module in (own, speculators, deepspec, specforge, zlab, eagle3)
}


def read_spec(path: str | Path) -> DrafterSpec:
    """Read the description of the drafter in directory `path`; the weights are left to `check_weights`.

    Raises:
        CheckpointError: no such directory, no or a damaged config.json, a kind of drafter that is not served, or a
            field that is missing or contradicts another; names the field or the kind.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise CheckpointError(
            f"the drafter directory {directory} does not exist",
            expected="a directory with config.json and model.safetensors",
            fix="Check --speculative-draft-model-path.",
        )
    fields = Fields.of(directory)
    refuse_unserved(fields)
    spec = _reader(fields).read(directory, fields)
    if spec.format not in READERS:
        raise fields.error(f"dspark_format is {spec.format!r}", f"one of {', '.join(READERS)}")
    _check_consistency(spec, fields)
    if "auto_map" in fields:
        logger.warning("%s names Python code (auto_map); it is never run", fields.path)
    return spec


def canonical_names(format: str) -> Callable[[str], str | None]:
    """Canonical name of a weight by its name in a file of this format; None for what is not loaded.

    `lm_head.weight` and `embed_tokens.weight` are kept where the format allows an own one; whether a drafter has one
    is `own_head` and `own_embedding` of its spec.
    """
    return READERS[format].rename


def _reader(fields: Fields) -> Reader:
    for reader in READERS.values():
        if reader.recognises(fields):
            return reader
    raise CheckpointError(
        f"{fields.path}: architectures is {fields.get('architectures')!r}, which is no drafter of a known format",
        expected="a drafter of DeepSpec, z-lab, SpecForge, speculators or this project, or LlamaForCausalLMEagle3",
        fix="Check --speculative-draft-model-path.",
    )


def _check_consistency(spec: DrafterSpec, fields: Fields) -> None:
    if spec.num_attention_heads % spec.num_key_value_heads:
        raise fields.error(
            f"num_attention_heads ({spec.num_attention_heads}) is no multiple of num_key_value_heads",
            f"a multiple of {spec.num_key_value_heads}",
        )
    if spec.mask_token_id is not None and spec.mask_token_id >= spec.vocab_size:
        raise fields.error(f"mask_token_id is {spec.mask_token_id}", f"an id below vocab_size ({spec.vocab_size})")
    if spec.family == "eagle3" and spec.layers != 1:
        raise fields.error(f"num_hidden_layers is {spec.layers}", "1: Eagle3 drafters of one layer are served")
    if spec.target_hidden_size != spec.hidden_size and not (spec.own_head and spec.own_embedding):
        raise fields.error(
            f"target_hidden_size ({spec.target_hidden_size}) is not hidden_size ({spec.hidden_size})",
            "the same, for a drafter that shares the target's embedding or output head",
        )
    if spec.sliding_window is not None:
        _check_window(spec, spec.sliding_window, fields)
    check_layer_ids(spec)


def _check_window(spec: DrafterSpec, window: int, fields: Fields) -> None:
    if spec.layer_kind == "gemma4":
        raise fields.error("its layers attend in a sliding window (layer_types)", "full attention in Gemma 4's layers")
    if window < spec.block_rows:
        raise fields.error(
            f"the sliding window of its layers is {window}, less than the {spec.block_rows} rows of its block",
            f"at least {spec.block_rows}: implementations differ in what such a window hides of the block",
        )


def check_layer_ids(spec: DrafterSpec) -> None:
    """Raise CheckpointError unless the feature layers are layers of the target, ascending, without the last."""
    ids, depth = spec.target_layer_ids, spec.num_target_layers
    limit = depth - 1 if depth is not None else max(ids, default=0) + 1
    if ids and not ascending_ids(list(ids), limit):
        raise CheckpointError(
            f"{spec.path / 'config.json'}: target_layer_ids is {list(ids)}",
            expected=f"ascending ids from 0 to {limit - 1}"
            + (
                f" (num_target_layers is {depth}; the last layer's output is not available before the final norm)"
                if depth is not None
                else ""
            ),
            fix="Use a drafter whose config.json is complete and as its format asks.",
        )
