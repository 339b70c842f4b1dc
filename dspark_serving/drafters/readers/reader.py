"""What a reader is, and what readers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_serving.drafters.fields import Fields, head_fields, layer_fields
from dspark_serving.drafters.spec import DrafterSpec, Family, LayerKind


@dataclass(frozen=True)
class Reader:
    """How drafters of one format are recognised and read.

    Args:
        format: its name.
        recognises: whether a config.json is of this format.
        read: the description of the drafter in a directory; raises CheckpointError.
        rename: canonical name of a weight by the name in the file; None for what is not loaded.
    """

    format: str
    recognises: Callable[[Fields], bool]
    read: Callable[[Path, Fields], DrafterSpec]
    rename: Callable[[str], str | None]


def architecture(fields: Fields) -> str:
    """The one entry of `architectures`; empty when there is none, or are several."""
    found = fields.get("architectures", [])
    return found[0] if isinstance(found, list) and len(found) == 1 and isinstance(found[0], str) else ""


def describe(
    directory: Path,
    fields: Fields,
    *,
    format: str,
    family: Family,
    layer_kind: LayerKind,
    **particulars: Any,
) -> DrafterSpec:
    """A spec from transformers' usual fields; `particulars` are the fields of the spec that differ from the usual."""
    shared = layer_fields(fields, chain=family == "eagle3")
    usual: dict[str, Any] = {
        "architecture": architecture(fields),
        "qk_norm": layer_kind != "llama",
        "draft_token_ids": None,
        "num_target_layers": None,
        "target_hidden_size": shared["hidden_size"],
        "anchor_predicts": True,
        "mask_token_id": None,
        "markov_rank": 0,
        "markov_head_type": "vanilla",
        "has_confidence": False,
        "confidence_with_markov": False,
        "own_head": False,
        "own_embedding": False,
        "norm_before_residual": False,
        "attention_k_eq_v": False,
        "embed_scale": 1.0,
        "final_logit_softcapping": None,
        "special_token_ids": (),
    }
    return DrafterSpec(
        path=directory,
        format=format,
        family=family,
        layer_kind=layer_kind,
        **(usual | shared | particulars),
    )


def block_fields(fields: Fields, *, anchor_predicts: bool) -> dict[str, Any]:
    """Block size, mask and heads of a DSpark or DFlash drafter.

    Args:
        anchor_predicts: whether the format's anchor row is a prediction unless `sample_from_anchor` says otherwise.
            A block of B rows then drafts B tokens, else B - 1.
    """
    predicts = fields.flag("sample_from_anchor", anchor_predicts)
    rows = fields.integer("block_size", low=1 if predicts else 2)
    return {
        "gamma": rows if predicts else rows - 1,
        "anchor_predicts": predicts,
        "mask_token_id": fields.integer("mask_token_id", low=0),
        **head_fields(fields),
    }


def special_tokens(fields: Fields) -> tuple[int, ...]:
    """The ids that end a text (eos_token_id), ascending."""
    found = fields.get("eos_token_id", [])
    ids = found if isinstance(found, list) else [found]
    return tuple(sorted(item for item in ids if type(item) is int))


def plain_rename(*dropped: str) -> Callable[[str], str | None]:
    """DeepSpec's names, with or without a leading `model.`; the weights `dropped` are not loaded."""

    def rename(name: str) -> str | None:
        canonical = name.removeprefix("model.")
        return None if canonical in dropped else canonical

    return rename


def any_of(names: Iterable[str]) -> Callable[[Fields], bool]:
    """Whether the architecture is one of `names`."""
    known = frozenset(names)
    return lambda fields: architecture(fields) in known
