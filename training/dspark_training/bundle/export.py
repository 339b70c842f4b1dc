"""Bundles: a trained drafter as a DeepSpec checkpoint without the target's frozen weights, and back again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_serving.drafters import DrafterSpec, read_spec
from dspark_serving.errors import CheckpointError
from dspark_training.config import DrafterShape
from dspark_training.data.vocab import DraftVocab
from dspark_training.models.backbone import BlockDrafter
from dspark_training.models.layers import DrafterDims
from dspark_training.target import Target


def export_bundle(
    directory: Path,
    drafter: BlockDrafter,
    target: Target,
    shape: DrafterShape,
    vocab: DraftVocab,
    scale_M: Tensor,
    card: str,
    provenance: dict[str, Any],
) -> None:
    """Write the bundle next to `directory` and move it into place, replacing what was there.

    Args:
        scale_M: feature scale of training, folded into `fc` here.
        card: text of README.md.
        provenance: written to training.json.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    weights["fc.weight"] = weights["fc.weight"] * scale_M
    save_file(
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()},
        partial / "model.safetensors",
        metadata={"format": "pt"},
    )
    (partial / "config.json").write_text(json.dumps(bundle_config(drafter, target, shape, vocab), indent=2) + "\n")
    (partial / "draft_vocab.json").write_text(json.dumps({"token_ids": vocab.ids_V.tolist()}) + "\n")
    (partial / "training.json").write_text(json.dumps(provenance, indent=2) + "\n")
    (partial / "README.md").write_text(card)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def bundle_config(drafter: BlockDrafter, target: Target, shape: DrafterShape, vocab: DraftVocab) -> dict[str, Any]:
    """config.json in DeepSpec's field names; `draft_vocab_size` is this project's addition."""
    dims = drafter.dims
    return {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": dims.hidden_size,
        "intermediate_size": dims.intermediate_size,
        "num_hidden_layers": dims.num_layers,
        "num_attention_heads": dims.num_heads,
        "num_key_value_heads": dims.num_kv_heads,
        "head_dim": dims.head_dim,
        "rms_norm_eps": dims.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": dims.rope_theta},
        "rope_theta": dims.rope_theta,
        "max_position_embeddings": target.config.max_position_embeddings,
        "vocab_size": dims.vocab_size,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "num_target_layers": target.config.num_hidden_layers,
        "block_size": dims.block_size,
        "mask_token_id": dims.mask_token_id,
        "target_layer_ids": list(shape.target_layer_ids),
        "markov_rank": dims.markov_rank if dims.markov_head_type != "none" else 0,
        "markov_head_type": dims.markov_head_type,
        "enable_confidence_head": dims.confidence_head,
        "confidence_head_with_markov": True,
        "draft_vocab_size": len(vocab.ids_V),
    }


def load_bundle(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[BlockDrafter, DrafterSpec]:
    """The drafter of a bundle in plain torch, and its description.

    Raises:
        CheckpointError: config.json is missing, contradicts itself, or is no DSpark drafter's.
    """
    spec = read_spec(directory)
    if spec.mask_token_id is None:
        raise CheckpointError(
            f"{directory} holds a drafter of the family {spec.family}",
            expected="a bundle of this package: a dspark drafter",
            fix="Use its own trainer's tools for it.",
        )
    config = json.loads((directory / "config.json").read_text())
    drafter = BlockDrafter(
        DrafterDims(
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_layers=spec.layers,
            num_heads=spec.num_attention_heads,
            num_kv_heads=spec.num_key_value_heads,
            head_dim=spec.head_dim,
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=config["rope_parameters"]["rope_theta"],
            num_features=len(spec.target_layer_ids),
            vocab_size=spec.vocab_size,
            block_size=spec.gamma,
            mask_token_id=spec.mask_token_id,
            markov_rank=spec.markov_rank,
            markov_head_type=spec.markov_head_type if spec.markov_rank else "none",
            confidence_head=bool(config["enable_confidence_head"]),
        )
    )
    drafter.load_state_dict(load_file(directory / "model.safetensors"))
    return drafter.to(dtype).eval(), spec
