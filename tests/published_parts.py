"""Names and shapes of the parts of published drafters, written out apart from the readers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
# (config.json, shapes of the weights, tables d2t and t2d) for a target's text config
Written = tuple[Config, Shapes, dict[str, torch.Tensor]]

GAMMA = 4
LAYERS = 2
MASK = 3
RANK = 8
WINDOW = 9
# What the reduced vocabularies leave out: the first ids and a part of the words.
DRAFT_VOCAB = tuple(range(7, 407))


def gemma4_fields(target: Config) -> Config:
    """A Gemma 4 text config as DeepSpec saved it: newer versions of transformers write head sizes layer by layer."""
    sizes = [layer["head_dim"] for layer in (target.get("per_layer_config") or {}).values() if "head_dim" in layer]
    return {
        "attention_k_eq_v": False,
        "global_head_dim": max(sizes, default=target["head_dim"]),
        "num_global_key_value_heads": target["num_key_value_heads"],
        **{name: value for name, value in target.items() if value is not None},
        "enable_moe_block": False,
        "hidden_size_per_layer_input": 0,
    }


def windowed(config: Config, **fields: Any) -> Config:
    """A Qwen3-like config whose first layer attends in a window, as transformers writes it."""
    kinds = ["sliding_attention"] + ["full_attention"] * (LAYERS - 1)
    return config | {"layer_types": kinds, "sliding_window": WINDOW, "use_sliding_window": True} | fields


def layer_shapes(target: Config, prefix: str, *, wide: bool = False, qk_norm: bool = True) -> Shapes:
    """A Qwen3 or Llama layer; `wide`: Eagle3's, with inputs of twice the width and a second norm."""
    d, inner, head = target["hidden_size"], target["intermediate_size"], target["head_dim"]
    q, kv = target["num_attention_heads"] * head, target["num_key_value_heads"] * head
    inputs = 2 * d if wide else d
    shapes: Shapes = {
        "self_attn.q_proj.weight": (q, inputs),
        "self_attn.k_proj.weight": (kv, inputs),
        "self_attn.v_proj.weight": (kv, inputs),
        "self_attn.o_proj.weight": (d, q),
        "mlp.gate_proj.weight": (inner, d),
        "mlp.up_proj.weight": (inner, d),
        "mlp.down_proj.weight": (d, inner),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
    }
    if qk_norm:
        shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    if wide:
        shapes["hidden_norm.weight"] = (d,)
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def gemma4_layer_shapes(target: Config, prefix: str, *, wide: bool = False) -> Shapes:
    """A Gemma 4 layer of full attention: global sizes, four norms, a scalar, and no v_proj when values are keys."""
    shared = target["attention_k_eq_v"]
    heads = target["num_global_key_value_heads" if shared else "num_key_value_heads"]
    full = target | {"head_dim": target["global_head_dim"], "num_key_value_heads": heads}
    d = target["hidden_size"]
    shapes = layer_shapes(full, prefix, wide=wide) | {
        f"{prefix}.pre_feedforward_layernorm.weight": (d,),
        f"{prefix}.post_feedforward_layernorm.weight": (d,),
        f"{prefix}.layer_scalar": (1,),
    }
    if shared:
        del shapes[f"{prefix}.self_attn.v_proj.weight"]
    return shapes


def block_shapes(target: Config, ids: list[int], layer: Callable[..., Shapes] = layer_shapes) -> Shapes:
    d = target["hidden_size"]
    shapes: Shapes = {"fc.weight": (d, len(ids) * d), "hidden_norm.weight": (d,), "norm.weight": (d,)}
    for i in range(LAYERS):
        shapes |= layer(target, f"layers.{i}")
    return shapes


def chain_shapes(target: Config, ids: list[int], layer: Shapes) -> Shapes:
    d = target["hidden_size"]
    return {"fc.weight": (d, len(ids) * d), "norm.weight": (d,)} | layer


def frozen_copies(target: Config) -> Shapes:
    """Frozen copies of the target's embedding and head; random here, so that using them would be seen."""
    shape = (target["vocab_size"], target["hidden_size"])
    return {"embed_tokens.weight": shape, "lm_head.weight": shape}


def head_shapes(target: Config, *, rows: int | None = None, head: str = "vanilla") -> Shapes:
    d, vocab = target["hidden_size"], target["vocab_size"]
    shapes: Shapes = {
        "markov_head.markov_w1.weight": (vocab, RANK),
        "markov_head.markov_w2.weight": (rows or vocab, RANK),
        "confidence_head.proj.weight": (1, d + RANK),
        "confidence_head.proj.bias": (1,),
    }
    if head == "gated":
        shapes |= {"markov_head.gate_proj.weight": (RANK, d + RANK), "markov_head.gate_proj.bias": (RANK,)}
    if head == "rnn":
        shapes |= {
            "markov_head.joint_proj.weight": (3 * RANK, 2 * RANK + d),
            "markov_head.joint_proj.bias": (3 * RANK,),
        }
    return shapes


def vocabulary_tables(target: Config) -> dict[str, torch.Tensor]:
    ids = torch.tensor(DRAFT_VOCAB)
    members = torch.zeros(target["vocab_size"], dtype=torch.bool)
    members[ids] = True
    return {"d2t": ids - torch.arange(len(ids)), "t2d": members}


def own_head(target: Config) -> Shapes:
    return {"lm_head.weight": (len(DRAFT_VOCAB), target["hidden_size"])}
