"""Tiny random drafters in every published format, with that format's exact key names and config fields.

The config fields are written out here, apart from the readers', so that a test compares two descriptions of a format.
Sources: the readers' docstrings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.published_parts import (
    GAMMA,
    LAYERS,
    MASK,
    RANK,
    Config,
    Written,
    block_shapes,
    chain_shapes,
    frozen_copies,
    gemma4_fields,
    gemma4_layer_shapes,
    head_shapes,
    layer_shapes,
    windowed,
)
from tests.published_tables import (
    llama_eagle3,
    speculators_dflash,
    speculators_dspark,
    speculators_dspark_after_anchor,
    speculators_dspark_windowed,
    speculators_eagle3,
)


def write_published(
    path: Path,
    target_config: Config,
    name: str,
    *,
    layer_ids: Sequence[int] = (0, 1, 2),
    seed: int = 1,
) -> Config:
    """Write the drafter `name` (a key of PUBLISHED) for a target; returns its config.json.

    Args:
        target_config: the target's config.json; its text_config counts.
        layer_ids: feature layers, as outputs of decoder layers; the formats that count otherwise get them so.
    """
    target = dict(target_config.get("text_config") or target_config)
    config, shapes, tables = PUBLISHED[name](target, list(layer_ids))
    generator = torch.Generator().manual_seed(seed)
    weights = {key: _random(key, shape, generator) for key, shape in shapes.items()}
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights | tables, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return config


def _random(key: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    return 1.0 + 0.1 * noise if "norm" in key or "scalar" in key else 0.15 * noise


def _deepspec(target: Config, ids: list[int], **fields: Any) -> Config:
    """DeepSpec copies the target's (text) config and adds its fields."""
    return target | {
        "num_target_layers": target["num_hidden_layers"],
        "num_hidden_layers": LAYERS,
        "layer_types": ["full_attention"] * LAYERS,
        "target_layer_ids": ids,
        "tie_word_embeddings": False,
        **fields,
    }


def _deepspec_block(target: Config, ids: list[int], *, architecture: str, rank: int, head: str = "vanilla") -> Config:
    heads: Config = {"markov_rank": rank, "enable_confidence_head": bool(rank)}
    if rank:
        heads |= {"markov_head_type": head, "confidence_head_with_markov": True}
    return _deepspec(
        target,
        ids,
        architectures=[architecture],
        block_size=GAMMA,
        mask_token_id=MASK,
        num_anchors=512,
        **heads,
    )


def _deepspec_eagle3(target: Config, ids: list[int], architecture: str) -> Config:
    return _deepspec(
        target,
        ids,
        architectures=[architecture],
        num_hidden_layers=1,
        layer_types=["full_attention"],
        draft_num_hidden_layers=1,
        ttt_length=GAMMA,
        step_loss_decay=0.8,
        target_model_name_or_path="some/target",
    )


def deepspec_dspark(target: Config, ids: list[int], head: str = "vanilla") -> Written:
    config = _deepspec_block(target, ids, architecture="Qwen3DSparkModel", rank=RANK, head=head)
    return config, block_shapes(target, ids) | head_shapes(target, head=head) | frozen_copies(target), {}


def deepspec_dflash(target: Config, ids: list[int]) -> Written:
    config = _deepspec_block(target, ids, architecture="Qwen3DSparkModel", rank=0)
    return config, block_shapes(target, ids) | frozen_copies(target), {}


def deepspec_eagle3(target: Config, ids: list[int]) -> Written:
    config = _deepspec_eagle3(target, ids, "Qwen3Eagle3Model")
    return config, chain_shapes(target, ids, layer_shapes(target, "layers.0", wide=True)) | frozen_copies(target), {}


def deepspec_gemma4_dspark(target: Config, ids: list[int]) -> Written:
    target = gemma4_fields(target)
    config = _deepspec_block(target, ids, architecture="Gemma4DSparkModel", rank=RANK)
    return config, block_shapes(target, ids, gemma4_layer_shapes) | head_shapes(target) | frozen_copies(target), {}


def deepspec_gemma4_dflash(target: Config, ids: list[int]) -> Written:
    target = gemma4_fields(target)
    config = _deepspec_block(target, ids, architecture="Gemma4DSparkModel", rank=0)
    return config, block_shapes(target, ids, gemma4_layer_shapes) | frozen_copies(target), {}


def deepspec_gemma4_eagle3(target: Config, ids: list[int]) -> Written:
    target = gemma4_fields(target)
    config = _deepspec_eagle3(target, ids, "Gemma4Eagle3Model")
    return (
        config,
        chain_shapes(target, ids, gemma4_layer_shapes(target, "layers.0", wide=True)) | frozen_copies(target),
        {},
    )


def _qwen3_fields(target: Config, architecture: str) -> Config:
    """What z-lab's and SpecForge's config.json say at the top level, in transformers' older spelling."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return {name: target[name] for name in sizes} | {
        "architectures": [architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "layer_types": ["full_attention"] * LAYERS,
        "max_position_embeddings": target["max_position_embeddings"],
        "max_window_layers": LAYERS,
        "model_type": "qwen3",
        "num_hidden_layers": LAYERS,
        "num_target_layers": target["num_hidden_layers"],
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    }


def zlab_dflash(target: Config, ids: list[int]) -> Written:
    config = _qwen3_fields(target, "DFlashDraftModel") | {
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": GAMMA + 1,
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": ids},
    }
    return config, block_shapes(target, ids), {}


def zlab_dflash_windowed(target: Config, ids: list[int]) -> Written:
    """As those for Qwen3.5 and later: windows in the first layers, whose rows see only those before them."""
    config, shapes, _ = zlab_dflash(target, ids)
    return windowed(config), shapes, {}


def _dspark_config(ids: list[int]) -> Config:
    return {
        "confidence_head_alpha": 1.0,
        "confidence_head_with_markov": True,
        "enable_confidence_head": True,
        "markov_head_type": "vanilla",
        "markov_rank": RANK,
        "mask_token_id": MASK,
        "projector_type": "dspark",
        "target_layer_ids": ids,
    }


def specforge_dspark(target: Config, ids: list[int]) -> Written:
    config = _qwen3_fields(target, "DSparkDraftModel") | {
        "auto_map": {"AutoModel": "dspark.DSparkDraftModel"},
        "block_size": GAMMA,
        "dflash_config": {"attention_mode": "gqa", **_dspark_config(ids)},
    }
    return config, block_shapes(target, ids) | head_shapes(target), {}


def specforge_dspark_windowed(target: Config, ids: list[int]) -> Written:
    """A window in the first layer, and rows that see only those before them in every layer."""
    config, shapes, _ = specforge_dspark(target, ids)
    return windowed(config, is_causal=True), shapes, {}


def specforge_dspark_as_dflash(target: Config, ids: list[int]) -> Written:
    """The older spelling: DFlash's architecture with projector_type dspark, the heads in dspark_config."""
    config = _qwen3_fields(target, "DFlashDraftModel") | {
        "block_size": GAMMA,
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": ids},
        "dspark_config": _dspark_config(ids),
    }
    return config, block_shapes(target, ids) | head_shapes(target), {}


def specforge_dflash(target: Config, ids: list[int]) -> Written:
    config = _qwen3_fields(target, "DFlashDraftModel") | {
        "block_size": GAMMA + 1,
        "dflash_config": {"mask_token_id": MASK, "projector_type": "dflash", "target_layer_ids": ids},
    }
    return config, block_shapes(target, ids), {}


PUBLISHED: dict[str, Callable[[Config, list[int]], Written]] = {
    "deepspec-dspark": deepspec_dspark,
    "deepspec-dspark-gated": lambda target, ids: deepspec_dspark(target, ids, "gated"),
    "deepspec-dspark-rnn": lambda target, ids: deepspec_dspark(target, ids, "rnn"),
    "deepspec-dflash": deepspec_dflash,
    "deepspec-eagle3": deepspec_eagle3,
    "z-lab-dflash": zlab_dflash,
    "z-lab-dflash-windowed": zlab_dflash_windowed,
    "specforge-dspark": specforge_dspark,
    "specforge-dspark-windowed": specforge_dspark_windowed,
    "specforge-dspark-as-dflash": specforge_dspark_as_dflash,
    "specforge-dflash": specforge_dflash,
    "speculators-dspark": speculators_dspark,
    "speculators-dspark-after-anchor": speculators_dspark_after_anchor,
    "speculators-dspark-windowed": speculators_dspark_windowed,
    "speculators-dflash": speculators_dflash,
    "speculators-eagle3": speculators_eagle3,
    "speculators-eagle3-qwen3": lambda target, ids: speculators_eagle3(target, ids, qwen3=True),
    "llama-eagle3": llama_eagle3,
    "llama-eagle3-own-embedding": lambda target, ids: llama_eagle3(target, ids, embedding=True),
    "llama-eagle3-whole-vocabulary": lambda target, ids: llama_eagle3(target, ids, reduced=False),
}
# For targets of Gemma 4: their text config must have the fields of transformers' Gemma4TextConfig.
PUBLISHED_GEMMA4: dict[str, Callable[[Config, list[int]], Written]] = {
    "deepspec-gemma4-dspark": deepspec_gemma4_dspark,
    "deepspec-gemma4-dflash": deepspec_gemma4_dflash,
    "deepspec-gemma4-eagle3": deepspec_gemma4_eagle3,
}
PUBLISHED |= PUBLISHED_GEMMA4
