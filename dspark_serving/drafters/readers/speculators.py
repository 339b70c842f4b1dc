"""vLLM's speculators: dspark, dflash and eagle3.

Source: vllm-project/speculators, src/speculators/models/{dspark,dflash,eagle3}/{config,core}.py; vllm,
vllm/transformers_utils/configs/speculators/algos.py (layer ids); read 2026-11. The layer's config is nested under
`transformer_layer_config`, without the fields that have their class's default. Layer id l means the input of decoder
layer l, one more than here. The draft length stands in `speculators_config`; a block of B rows drafts B tokens or
B - 1, by `sample_from_anchor` or, before that field existed, by the draft length. embed_tokens and a full-size
lm_head are the target's; lm_head of a reduced vocabulary is the drafter's own, as is markov_w2. Rows of windowed layers
see those before them only, unless `sliding_window_non_causal`; training counts the window from the anchor, serving
(vLLM's too) from each row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dspark_serving.drafters.fields import Fields
from dspark_serving.drafters.files import weight_names
from dspark_serving.drafters.readers.eagle3 import DEFAULT_GAMMA, refuse_variants
from dspark_serving.drafters.readers.reader import Reader, block_fields, describe
from dspark_serving.drafters.readers.vocabulary import TABLES, draft_token_ids
from dspark_serving.drafters.spec import DrafterSpec, Family, LayerKind

FORMAT = "speculators"
_VERIFIER = ("verifier_lm_head.weight", "verifier_norm.weight")
# Defaults of the layer's config class in transformers, which a nested config leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "use_sliding_window": True,  # a Qwen3 config has this switch, a Llama config keeps any window
    },
}


def read(directory: Path, fields: Fields) -> DrafterSpec:
    """Read a dspark, dflash or eagle3 speculator."""
    kind = fields.get("speculators_model_type")
    if kind not in ("dspark", "dflash", "eagle3"):
        raise fields.error(f"speculators_model_type is {kind!r}", "dspark, dflash or eagle3")
    eagle = kind == "eagle3"
    nested, named = _layer(fields, "llama" if eagle else "qwen3")
    vocabulary = draft_token_ids(directory, nested.with_defaults({"draft_vocab_size": fields.get("draft_vocab_size")}))
    particulars = _eagle3(directory, fields) if eagle else _block(fields, kind == "dspark")
    family: Family = "eagle3" if eagle else "dspark" if particulars["markov_rank"] else "dflash"
    hidden_size = nested.integer("hidden_size", low=1)
    return describe(
        directory,
        nested,
        format=FORMAT,
        family=family,
        layer_kind=named if eagle else "qwen3",  # block drafters have Qwen3's layers, whatever their config is called
        architecture=f"{kind} speculator",
        draft_token_ids=vocabulary,
        target_hidden_size=fields.integer("target_hidden_size", low=1, default=hidden_size),
        own_head=vocabulary is not None,
        **particulars,
    )


def _layer(fields: Fields, usual: str) -> tuple[Fields, LayerKind]:
    """The layer's config with its class's defaults, and the kind of layer that it names."""
    nested = fields.part("transformer_layer_config")
    kind = nested.text("model_type", usual)
    if kind not in _DEFAULTS:
        raise fields.error(f"model_type of transformer_layer_config is {kind!r}", f"one of {', '.join(_DEFAULTS)}")
    dtype = {"dtype": fields.text("dtype", fields.text("torch_dtype", "bfloat16"))}
    return nested.with_defaults(_DEFAULTS[kind] | dtype), "llama" if kind == "llama" else "qwen3"


def _block(fields: Fields, dspark: bool) -> dict[str, Any]:
    if fields.get("projector_type", "dflash") != "dflash":
        raise fields.error(f"projector_type is {fields.get('projector_type')!r}", "dflash")
    drafted = _draft_length(fields)
    predicts = dspark if drafted is None else drafted == fields.integer("block_size", low=1)
    return {
        "target_layer_ids": _layer_ids(fields, "aux_hidden_state_layer_ids"),
        "is_causal": False if fields.flag("sliding_window_non_causal", False) else None,
        **block_fields(fields, anchor_predicts=predicts),
    }


def _eagle3(directory: Path, fields: Fields) -> dict[str, Any]:
    refuse_variants(fields)
    name = "eagle_aux_hidden_state_layer_ids"
    return {
        "target_layer_ids": _layer_ids(fields, name) if name in fields else (),
        "gamma": _draft_length(fields) or DEFAULT_GAMMA,
        "norm_before_residual": fields.flag("norm_before_residual", False),
        "own_embedding": "embed_tokens.weight" in weight_names(directory),
    }


def _layer_ids(fields: Fields, name: str) -> tuple[int, ...]:
    return tuple(layer - 1 for layer in fields.integers(name))


def _draft_length(fields: Fields) -> int | None:
    """Tokens a round of the default proposal method; None when there is none."""
    proposals = fields.part("speculators_config")
    methods = proposals.get("proposal_methods", [])
    if not isinstance(methods, list) or not all(isinstance(method, dict) for method in methods):
        raise fields.error(f"proposal_methods is {methods!r}", "a list of objects")
    default = proposals.get("default_proposal_method")
    chosen = [method for method in methods if method.get("proposal_type") == default] or methods
    if not chosen or "speculative_tokens" not in chosen[0]:
        return None
    return Fields(fields.path, chosen[0]).integer("speculative_tokens", low=1)


def rename(name: str) -> str | None:
    """Canonical name of a weight."""
    return None if name in TABLES + _VERIFIER or name.endswith("rotary_emb.inv_freq") else name


READER = Reader(
    format=FORMAT,
    recognises=lambda fields: "speculators_model_type" in fields,
    read=read,
    rename=rename,
)
