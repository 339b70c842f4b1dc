"""Exports for others: DeepSpec's and SpecForge's formats, in what stock SGLang (0.5.23) loads of them.

Stock SGLang's DSPARK worker takes Qwen3's layers with the target's own embedding and head, the whole vocabulary, and a
Markov head. What it cannot express is refused, but for two things: a DFlash drafter gets a Markov head of zeros, which
changes no draft, and a reduced draft vocabulary may be given up. Fields: deepspec.py and specforge.py of the readers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark_serving.drafters import DrafterSpec, check_weights, read_spec
from dspark_serving.drafters.weights import weights_of
from dspark_serving.errors import CheckpointError, OptionError
from dspark_training.bundle.network import target_tables
from dspark_training.bundle.publish import replacing
from dspark_training.target import Target

ForeignFormat = Literal["deepspec", "specforge"]
FOREIGN_FORMATS: tuple[ForeignFormat, ...] = get_args(ForeignFormat)
_ZERO_RANK = 1


def export_foreign(
    source: Path,
    directory: Path,
    format: ForeignFormat,
    target: Target | None = None,
    *,
    whole_vocabulary: bool = False,
) -> DrafterSpec:
    """Write the drafter in `source` (any format that is read) in another project's format.

    Args:
        target: for DeepSpec's format, which holds frozen copies of the target's embedding and output head.
        whole_vocabulary: let a drafter of a reduced vocabulary propose every token, as no format but ours knows
            reduced ones here; its drafts change a little, its texts do not.

    Returns:
        What was written, as our reader of that format sees it.

    Raises:
        CheckpointError: `source` cannot be read, or that format cannot express it (names the reasons).
        OptionError: DeepSpec's format without a target.
    """
    spec = read_spec(source)
    check_weights(spec)
    reasons = _inexpressible(spec, format, whole_vocabulary)
    if reasons:
        raise CheckpointError(
            f"the drafter {source} cannot be written in {format}'s format: {'; '.join(reasons)}",
            expected="a drafter of Qwen3's layers that shares the target's embedding and output head",
            fix="Serve it with this project's plugin instead.",
        )
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights_of(spec).items()}
    if spec.family == "dflash":
        weights |= _markov_head_of_zeros(spec)
    if format == "deepspec":
        weights |= _frozen_copies(target)
    with replacing(directory) as partial:
        save_file({k: v.contiguous() for k, v in weights.items()}, partial / "model.safetensors", {"format": "pt"})
        config = deepspec_config(spec) if format == "deepspec" else specforge_config(spec)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        check_weights(read_spec(partial))
    return read_spec(directory)


def foreign_format(name: str) -> ForeignFormat:
    """The format of that name; raises OptionError for another."""
    for format in FOREIGN_FORMATS:
        if format == name:
            return format
    raise OptionError(f"--format {name}", expected=f"one of {', '.join(FOREIGN_FORMATS)}", fix="Correct the option.")


def deepspec_config(spec: DrafterSpec) -> dict[str, Any]:
    """config.json as DeepSpec writes it: the target's fields and the drafter's, all at the top level."""
    config = _layer_config(spec) | {"target_layer_ids": list(spec.target_layer_ids)}
    if spec.family == "eagle3":
        return config | {
            "architectures": ["Qwen3Eagle3Model"],
            "ttt_length": spec.gamma,
            "draft_num_hidden_layers": spec.layers,
        }
    return config | {"architectures": ["Qwen3DSparkModel"], "block_size": spec.gamma} | _head_config(spec)


def specforge_config(spec: DrafterSpec) -> dict[str, Any]:
    """config.json as SpecForge writes it: the drafter's fields in `dflash_config`."""
    return _layer_config(spec) | {
        "architectures": ["DSparkDraftModel"],
        "block_size": spec.gamma,
        "dflash_config": {
            "projector_type": "dspark",
            "target_layer_ids": list(spec.target_layer_ids),
            **_head_config(spec),
        },
        # SGLang 0.5.23 reads the heads' fields at the top level too.
        **_head_config(spec),
    }


def _layer_config(spec: DrafterSpec) -> dict[str, Any]:
    """Transformers' fields of a Qwen3 stack."""
    eos = {"eos_token_id": list(spec.special_token_ids)} if spec.special_token_ids else {}
    return eos | {
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "hidden_act": spec.hidden_act,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_parameters": dict(spec.rope),
        "rope_theta": spec.rope["rope_theta"],
        "max_position_embeddings": spec.max_position_embeddings,
        "layer_types": list(spec.layer_types),
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": False,
        "attention_bias": spec.attention_bias,
        "num_target_layers": spec.num_target_layers,
    }


def _head_config(spec: DrafterSpec) -> dict[str, Any]:
    return {
        "mask_token_id": spec.mask_token_id,
        "markov_rank": spec.markov_rank or _ZERO_RANK,
        "markov_head_type": spec.markov_head_type,
        "enable_confidence_head": spec.has_confidence,
        "confidence_head_with_markov": spec.confidence_with_markov,
    }


def _inexpressible(spec: DrafterSpec, format: ForeignFormat, whole_vocabulary: bool) -> list[str]:
    """What the drafter has that the format, or stock SGLang's reading of it, lacks."""
    reduced = spec.draft_token_ids is not None and not whole_vocabulary
    windowed = spec.sliding_window is not None or bool(spec.is_causal)
    found = [
        (spec.layer_kind != "qwen3" or not spec.qk_norm, f"its layers are {spec.layer_kind}'s"),
        (windowed, "its layers attend in a sliding window, or causally"),
        (not spec.anchor_predicts, "its anchor's row predicts nothing"),
        (spec.own_head or spec.own_embedding, "it has an embedding or output head of its own"),
        (spec.attention_k_eq_v, "its values are its keys"),
        (spec.embed_scale != 1.0, f"it scales embeddings by {spec.embed_scale:g}"),
        (spec.final_logit_softcapping is not None, "it caps its logits"),
        (spec.num_target_layers is None or not spec.target_layer_ids, "it does not name its target's layers"),
        (spec.family == "eagle3" and format != "deepspec", "Eagle3 drafters there have Llama's layers"),
        (reduced, "it proposes tokens of a reduced vocabulary only (the whole one must be asked for)"),
    ]
    return [reason for holds, reason in found if holds]


def _markov_head_of_zeros(spec: DrafterSpec) -> dict[str, Tensor]:
    shape = (spec.vocab_size, _ZERO_RANK)
    names = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")
    return {name: torch.zeros(shape, dtype=torch.bfloat16) for name in names}


def _frozen_copies(target: Target | None) -> Mapping[str, Tensor]:
    if target is None:
        raise OptionError(
            "DeepSpec's format without a target",
            expected="the target's checkpoint: that format holds copies of its embedding and output head",
            fix="Add --target.",
        )
    tables = target_tables(target)
    return {name: tensor.to(torch.bfloat16) for name, tensor in tables.items()}
