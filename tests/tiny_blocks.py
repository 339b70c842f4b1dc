"""Tiny random block drafters in the canonical form, for what no published format has together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny_models import write_drafter

GAMMA = 4


def make_tiny_block(path: Path, target_config: dict[str, Any], *, seed: int = 1, **fields: Any) -> Path:
    """Write a drafter for a target; `fields` replace those of a DSpark drafter with Qwen3's layers. Returns `path`."""
    d = target_config["hidden_size"]
    config = {
        "architectures": ["DsparkServingBlockDrafter"],
        "model_type": "qwen3",
        "dspark_format": "dspark-serving",
        "family": "dspark",
        "layer_kind": "qwen3",
        "hidden_size": d,
        "intermediate_size": 2 * d,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": False,
        "num_hidden_layers": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 2048,
        "vocab_size": target_config["vocab_size"],
        "num_target_layers": target_config["num_hidden_layers"],
        "block_size": GAMMA,
        "sample_from_anchor": True,
        "mask_token_id": 3,
        "target_layer_ids": [0, 2],
        "markov_rank": 8,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "own_head": False,
        "own_embedding": False,
        "dtype": "float32",
    } | fields
    ids = config.pop("draft_token_ids", None)
    if ids is not None:
        config["draft_vocab_size"] = len(ids)
    write_drafter(path, config, ids, seed=seed, shapes=_shapes(config))
    return path


DFLASH: dict[str, Any] = {
    "family": "dflash",
    "markov_rank": 0,
    "enable_confidence_head": False,
    "confidence_head_with_markov": False,
}


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    vocab, rank, kind = config["vocab_size"], config["markov_rank"], config["layer_kind"]
    rows = config.get("draft_vocab_size", vocab) if config["own_head"] else vocab
    shapes: dict[str, tuple[int, ...]] = {"hidden_norm.weight": (d,), "norm.weight": (d,)}
    shapes["fc.weight"] = (d, len(config["target_layer_ids"]) * d)
    for layer in (f"layers.{i}" for i in range(config["num_hidden_layers"])):
        shapes |= {f"{layer}.{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
        projections = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": shape for name, shape in projections.items()}
        if config["attention_bias"]:
            shapes |= {f"{layer}.self_attn.{name}_proj.bias": shape[:1] for name, shape in projections.items()}
        if kind != "llama":
            shapes |= {f"{layer}.self_attn.{name}_norm.weight": (width,) for name in "qk"}
        mlp = {"gate": (inner, d), "up": (inner, d), "down": (d, inner)}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": shape for name, shape in mlp.items()}
    if rank:
        shapes |= {"markov_head.markov_w1.weight": (vocab, rank), "markov_head.markov_w2.weight": (rows, rank)}
    if rank and config["markov_head_type"] == "rnn":
        shapes |= {
            "markov_head.joint_proj.weight": (3 * rank, 2 * rank + d),
            "markov_head.joint_proj.bias": (3 * rank,),
        }
    if config["enable_confidence_head"]:
        seen = d + (rank if config["confidence_head_with_markov"] else 0)
        shapes |= {"confidence_head.proj.weight": (1, seen), "confidence_head.proj.bias": (1,)}
    if config["own_head"]:
        shapes["lm_head.weight"] = (rows, d)
    if config["own_embedding"]:
        shapes["embed_tokens.weight"] = (vocab, d)
    return shapes
