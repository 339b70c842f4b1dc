"""LlamaForCausalLMEagle3: EAGLE-3 drafters of SafeAILab's, SpecForge's and others, of one Llama layer.

Source: SafeAILab/EAGLE, eagle/model/cnets.py; sgl-project/SpecForge, specforge/modeling/draft/llama3_eagle.py and
configs/*-eagle3.json; sglang 0.5.23, srt/models/llama_eagle3.py; read 2026-11. The layer's weights are `midlayer.*`
(newer: `layers.0.*`); lm_head covers the draft vocabulary; embed_tokens may be left out. Feature layers stand in
`eagle_config.eagle_aux_hidden_state_layer_ids` (outputs of those layers), or are EAGLE-3's default for the target's
depth. Nothing says how far it was unrolled in training.
"""

from __future__ import annotations

from pathlib import Path

from dspark_serving.drafters.fields import Fields
from dspark_serving.drafters.files import weight_names
from dspark_serving.drafters.readers.reader import Reader, architecture, describe
from dspark_serving.drafters.readers.vocabulary import TABLES, draft_token_ids
from dspark_serving.drafters.spec import DrafterSpec

FORMAT = "eagle3"
# What published speculators declare (RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3).
DEFAULT_GAMMA = 5
# Variants whose extra norms are not served.
_VARIANTS = ("bias", "norm_before_fc", "fc_norm", "use_aux_norm", "norm_output")


def read(directory: Path, fields: Fields) -> DrafterSpec:
    """Read an EAGLE-3 drafter; the names of its weights say whether it has an own head and embedding."""
    eagle = fields.over("eagle_config")
    refuse_variants(eagle)
    ids = eagle.integers("eagle_aux_hidden_state_layer_ids") if "eagle_aux_hidden_state_layer_ids" in eagle else ()
    names = {rename(name) for name in weight_names(directory)}
    hidden_size = fields.integer("hidden_size", low=1)
    vocabulary = draft_token_ids(directory, fields)
    if fields.flag("tie_word_embeddings", False) and not names & {"lm_head.weight"} and "embed_tokens.weight" in names:
        raise fields.error("tie_word_embeddings is true", "an own lm_head, or the target's")
    return describe(
        directory,
        fields,
        format=FORMAT,
        family="eagle3",
        layer_kind="llama",
        gamma=DEFAULT_GAMMA,
        draft_token_ids=vocabulary,
        target_layer_ids=ids,
        target_hidden_size=fields.integer("target_hidden_size", low=1, default=hidden_size),
        own_head=vocabulary is not None or "lm_head.weight" in names,
        own_embedding="embed_tokens.weight" in names,
    )


def refuse_variants(fields: Fields) -> None:
    """Raise CheckpointError for norms or biases around `fc` that plain EAGLE-3 does not have."""
    for name in _VARIANTS:
        if fields.get(name):
            raise fields.error(f"{name} is {fields.get(name)!r}", "plain EAGLE-3: one fc without bias and extra norms")


def rename(name: str) -> str | None:
    """Canonical name of a weight."""
    name = name.removeprefix("model.")
    if name in TABLES or name.endswith("rotary_emb.inv_freq"):
        return None
    return f"layers.0.{name.removeprefix('midlayer.')}" if name.startswith("midlayer.") else name


def recognises(fields: Fields) -> bool:
    """By its name, or as a Llama of one layer with a draft vocabulary, as SafeAILab and nebius call theirs."""
    name = architecture(fields)
    unnamed = name == "LlamaForCausalLM" and fields.get("num_hidden_layers") == 1 and "draft_vocab_size" in fields
    return unnamed or name in ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")


READER = Reader(format=FORMAT, recognises=recognises, read=read, rename=rename)
