"""DeepSpec's checkpoints, with a reduced draft vocabulary where draft_vocab.json stands beside them.

Source: deepseek-ai/DeepSpec, deepspec/modeling/{dspark,eagle3}/{qwen3,gemma4}/{config,modeling}.py (MIT), read 2026-11.
config.json is the target's own (text) config with the drafter's fields added at the top level. embed_tokens and lm_head
are frozen copies of the target's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dspark_serving.drafters.fields import Fields
from dspark_serving.drafters.readers.reader import (
    Reader,
    any_of,
    architecture,
    block_fields,
    describe,
    plain_rename,
    special_tokens,
)
from dspark_serving.drafters.spec import DrafterSpec, Family, LayerKind, ascending_ids, read_json_object
from dspark_serving.errors import CheckpointError

FORMAT = "deepspec"
VOCABULARY_FILE = "draft_vocab.json"

_BLOCK = ("Qwen3DSparkModel", "Gemma4DSparkModel")
_EAGLE3 = ("Qwen3Eagle3Model", "Gemma4Eagle3Model")


def read(directory: Path, fields: Fields) -> DrafterSpec:
    """Read a DSpark, DFlash (markov_rank 0) or Eagle3 drafter of DeepSpec's."""
    name = architecture(fields)
    kind: LayerKind = "gemma4" if name.startswith("Gemma4") else "qwen3"
    particulars: dict[str, Any] = {
        "num_target_layers": fields.integer("num_target_layers", low=1),
        "target_layer_ids": fields.integers("target_layer_ids"),
        "special_token_ids": special_tokens(fields),
        "draft_token_ids": draft_vocabulary(directory, fields),
    }
    family: Family = "eagle3"
    if name in _EAGLE3:
        particulars["gamma"] = fields.integer("ttt_length", low=1)
    else:
        fields.integer("markov_rank", low=0)  # required: 0 is what makes a DFlash drafter
        particulars |= block_fields(fields, anchor_predicts=True)
        family = "dspark" if particulars["markov_rank"] else "dflash"
    if kind == "gemma4":
        fields, gemma = _gemma4(fields)
        particulars |= gemma
    return describe(directory, fields, format=FORMAT, family=family, layer_kind=kind, **particulars)


def draft_vocabulary(directory: Path, fields: Fields) -> tuple[int, ...] | None:
    """The ids in draft_vocab.json, which stands beside `draft_vocab_size`; None without either.

    Raises:
        CheckpointError: one of them is missing, or they contradict each other.
    """
    path = directory / VOCABULARY_FILE
    if "draft_vocab_size" not in fields:
        if path.exists():
            raise fields.error(f"draft_vocab_size is missing beside {VOCABULARY_FILE}", "both of them, or neither")
        return None
    size, vocab_size = fields.get("draft_vocab_size"), fields.integer("vocab_size", low=1)
    ids = read_json_object(path, 'an object {"token_ids": [...]}').get("token_ids")
    if not isinstance(ids, list) or not ascending_ids(ids, vocab_size) or len(ids) != size:
        raise CheckpointError(
            f"{path}: token_ids is not a list of {size} different ids",
            expected=f"draft_vocab_size ({size}) ascending ids below vocab_size ({vocab_size})",
            fix="Export the drafter again.",
        )
    return tuple(ids)


def vocabulary_text(ids: tuple[int, ...]) -> str:
    """What stands in draft_vocab.json for these ids."""
    return json.dumps({"token_ids": list(ids)}) + "\n"


def _gemma4(fields: Fields) -> tuple[Fields, dict[str, Any]]:
    """The fields as those of an ordinary layer, and what is Gemma 4's own.

    Every draft layer is a full-attention layer, so the `global` sizes and rotary settings hold.
    """
    if fields.flag("use_double_wide_mlp", False) and fields.integer("num_kv_shared_layers", low=0, default=0):
        raise fields.error("use_double_wide_mlp with num_kv_shared_layers", "MLPs of one width")
    if fields.get("hidden_size_per_layer_input", 0):
        raise fields.error("hidden_size_per_layer_input is not 0", "layers without an own input embedding")
    shared = fields.flag("attention_k_eq_v", False)
    rope = fields.part("rope_parameters")
    hidden_size = fields.integer("hidden_size", low=1)
    plain = Fields(
        fields.path,
        dict(fields.items())
        | {
            "head_dim": fields.integer("global_head_dim", low=1),
            "num_key_value_heads": fields.integer(
                "num_global_key_value_heads" if shared else "num_key_value_heads", low=1
            ),
            "hidden_act": fields.text("hidden_activation", "gelu_pytorch_tanh"),
            "rope_parameters": dict((rope.part("full_attention") if "full_attention" in rope else rope).items()),
        },
    )
    cap = fields.number("final_logit_softcapping", 1.0) if "final_logit_softcapping" in fields else None
    return plain, {
        "attention_k_eq_v": shared,
        "embed_scale": hidden_size**0.5,
        "final_logit_softcapping": cap,
    }


READER = Reader(
    format=FORMAT,
    recognises=any_of(_BLOCK + _EAGLE3),
    read=read,
    rename=plain_rename("embed_tokens.weight", "lm_head.weight"),
)
