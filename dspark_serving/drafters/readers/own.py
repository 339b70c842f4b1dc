"""Canonical directories: the views that serving writes, and drafters written in that form directly.

config.json holds every field of the description under DeepSpec's names, see `canonical_config`. A view's weights keep
the names of the format that it was made from (`dspark_format`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from dspark_serving.drafters.fields import Fields, head_fields
from dspark_serving.drafters.readers.deepspec import draft_vocabulary
from dspark_serving.drafters.readers.reader import (
    Reader,
    any_of,
    describe,
    plain_rename,
    special_tokens,
)
from dspark_serving.drafters.spec import DrafterSpec, Family, LayerKind

FORMAT = "dspark-serving"
BLOCK_ARCHITECTURE = "DsparkServingBlockDrafter"
EAGLE3_ARCHITECTURE = "DsparkServingEagle3Drafter"


def canonical_config(spec: DrafterSpec) -> dict[str, Any]:
    """config.json of a canonical directory, as SGLang's model classes and `read` take it."""
    config: dict[str, Any] = {
        "architectures": [EAGLE3_ARCHITECTURE if spec.family == "eagle3" else BLOCK_ARCHITECTURE],
        "model_type": "qwen3",  # a type that transformers and SGLang know, whatever the layers are
        "dspark_format": spec.format,
        "source_architecture": spec.architecture,
        "family": spec.family,
        "layer_kind": spec.layer_kind,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "head_dim": spec.head_dim,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "attention_bias": spec.attention_bias,
        "qk_norm": spec.qk_norm,
        "num_hidden_layers": spec.layers,
        "hidden_act": spec.hidden_act,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_parameters": dict(spec.rope),
        "max_position_embeddings": spec.max_position_embeddings,
        "layer_types": list(spec.layer_types),
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": False,
        "dtype": spec.dtype,
        "target_hidden_size": spec.target_hidden_size,
        "block_size": spec.gamma,
        "sample_from_anchor": spec.anchor_predicts,
        "markov_rank": spec.markov_rank,
        "markov_head_type": spec.markov_head_type,
        "enable_confidence_head": spec.has_confidence,
        "confidence_head_with_markov": spec.confidence_with_markov,
        "own_head": spec.own_head,
        "own_embedding": spec.own_embedding,
        "norm_before_residual": spec.norm_before_residual,
        "attention_k_eq_v": spec.attention_k_eq_v,
        "embed_scale": spec.embed_scale,
    }
    optional = {
        "num_target_layers": spec.num_target_layers,
        "target_layer_ids": list(spec.target_layer_ids) or None,
        "mask_token_id": spec.mask_token_id,
        "draft_vocab_size": None if spec.draft_token_ids is None else len(spec.draft_token_ids),
        "use_sliding_window": spec.sliding_window is not None or None,  # transformers drops the window without it
        "sliding_window": spec.sliding_window,
        "is_causal": spec.is_causal,
        "final_logit_softcapping": spec.final_logit_softcapping,
        "eos_token_id": list(spec.special_token_ids) or None,
    }
    return config | {name: value for name, value in optional.items() if value is not None}


def read(directory: Path, fields: Fields) -> DrafterSpec:
    """Read a canonical directory; fields that have a usual value may be left out."""
    family: Family = _one_of(fields, "family", get_args(Family))
    kind: LayerKind = _one_of(fields, "layer_kind", get_args(LayerKind))
    hidden_size = fields.integer("hidden_size", low=1)
    particulars: dict[str, Any] = {
        "architecture": fields.text("source_architecture", ""),
        "num_target_layers": fields.integer("num_target_layers", low=1) if "num_target_layers" in fields else None,
        "target_layer_ids": fields.integers("target_layer_ids") if "target_layer_ids" in fields else (),
        "target_hidden_size": fields.integer("target_hidden_size", low=1, default=hidden_size),
        "gamma": fields.integer("block_size", low=1),  # here the drafted tokens, whatever the anchor's row does
        "anchor_predicts": fields.flag("sample_from_anchor", True),
        "qk_norm": fields.flag("qk_norm", kind != "llama"),
        "draft_token_ids": draft_vocabulary(directory, fields),
        "own_head": fields.flag("own_head", False),
        "own_embedding": fields.flag("own_embedding", False),
        "norm_before_residual": fields.flag("norm_before_residual", False),
        "attention_k_eq_v": fields.flag("attention_k_eq_v", False),
        "embed_scale": fields.number("embed_scale", 1.0),
        "special_token_ids": special_tokens(fields),
    }
    if "final_logit_softcapping" in fields:
        particulars["final_logit_softcapping"] = fields.number("final_logit_softcapping", 1.0)
    if family != "eagle3":
        particulars |= {"mask_token_id": fields.integer("mask_token_id", low=0), **head_fields(fields)}
    return describe(
        directory,
        fields,
        format=fields.text("dspark_format", FORMAT),
        family=family,
        layer_kind=kind,
        **particulars,
    )


def _one_of(fields: Fields, name: str, known: tuple[Any, ...]) -> Any:
    value = fields.get(name)
    if value not in known:
        raise fields.error(f"{name} is {value!r}", f"one of {', '.join(known)}")
    return value


READER = Reader(
    format=FORMAT,
    recognises=any_of((BLOCK_ARCHITECTURE, EAGLE3_ARCHITECTURE)),
    read=read,
    rename=plain_rename(),
)
