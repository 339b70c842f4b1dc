"""Published drafters whose draft vocabulary is a table among the weights: speculators, and Llama's EAGLE-3."""

from __future__ import annotations

from typing import Any

from tests.published_parts import (
    DRAFT_VOCAB,
    GAMMA,
    LAYERS,
    MASK,
    RANK,
    Config,
    Written,
    block_shapes,
    chain_shapes,
    head_shapes,
    layer_shapes,
    own_head,
    vocabulary_tables,
    windowed,
)


def _speculators(target: Config, kind: str, *, layers: int, model_type: str, drafted: int, **fields: Any) -> Config:
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return {
        "architectures": [f"{kind}Speculator"],
        "draft_vocab_size": len(DRAFT_VOCAB),
        "dtype": "float32",
        "speculators_config": {
            "algorithm": kind.lower(),
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "accept_tolerance": 0.0,
                    "proposal_type": "greedy",
                    "speculative_tokens": drafted,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {"architectures": target["architectures"], "name_or_path": "some/target"},
        },
        "speculators_model_type": kind.lower(),
        "speculators_version": "0.5.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": {name: target[name] for name in sizes}
        | {
            "model_type": model_type,
            "num_hidden_layers": layers,
            "max_position_embeddings": target["max_position_embeddings"],
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        **fields,
    }


def speculators_dspark(target: Config, ids: list[int]) -> Written:
    config = _speculators(
        target,
        "DSpark",
        layers=LAYERS,
        model_type="qwen3",
        drafted=GAMMA,
        aux_hidden_state_layer_ids=[layer + 1 for layer in ids],
        block_size=GAMMA,
        confidence_head_with_markov=True,
        enable_confidence_head=True,
        markov_head_type="vanilla",
        markov_rank=RANK,
        mask_token_id=MASK,
        sample_from_anchor=True,
    )
    return (
        config,
        block_shapes(target, ids) | head_shapes(target, rows=len(DRAFT_VOCAB)) | own_head(target),
        vocabulary_tables(target),
    )


def speculators_dspark_after_anchor(target: Config, ids: list[int]) -> Written:
    """The whole vocabulary, and an anchor row that predicts nothing; told by the draft length alone."""
    config, shapes, _ = speculators_dspark(target, ids)
    del config["sample_from_anchor"]
    config |= {"block_size": GAMMA + 1, "draft_vocab_size": target["vocab_size"]}
    del shapes["lm_head.weight"]
    return config, shapes | head_shapes(target), {}


def speculators_dspark_windowed(target: Config, ids: list[int]) -> Written:
    """A window in the first layer, whose rows see each other in both directions."""
    config, shapes, tables = speculators_dspark_after_anchor(target, ids)
    layer = windowed(config["transformer_layer_config"])
    return config | {"transformer_layer_config": layer, "sliding_window_non_causal": True}, shapes, tables


def speculators_dflash(target: Config, ids: list[int]) -> Written:
    config = _speculators(
        target,
        "DFlash",
        layers=LAYERS,
        model_type="qwen3",
        drafted=GAMMA,
        aux_hidden_state_layer_ids=[layer + 1 for layer in ids],
        block_size=GAMMA + 1,
        mask_token_id=MASK,
        max_anchors=256,
    )
    copies = {"embed_tokens.weight": (target["vocab_size"], target["hidden_size"])}
    return config, block_shapes(target, ids) | copies | own_head(target), vocabulary_tables(target)


def speculators_eagle3(target: Config, ids: list[int], *, qwen3: bool = False) -> Written:
    config = _speculators(
        target,
        "Eagle3",
        layers=1,
        model_type="qwen3" if qwen3 else "llama",
        drafted=GAMMA,
        auto_map={"": "eagle3.Eagle3SpeculatorConfig"},
        eagle_aux_hidden_state_layer_ids=[layer + 1 for layer in ids],
        embed_requires_grad=False,
        norm_before_fc=False,
        norm_before_residual=True,
    )
    embedding = {"embed_tokens.weight": (target["vocab_size"], target["hidden_size"])}
    layer = layer_shapes(target, "layers.0", wide=True, qk_norm=qwen3)
    return config, chain_shapes(target, ids, layer) | embedding | own_head(target), vocabulary_tables(target)


def llama_eagle3(target: Config, ids: list[int], *, embedding: bool = False, reduced: bool = True) -> Written:
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    config = {name: target[name] for name in sizes} | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "bos_token_id": 1,
        "draft_vocab_size": len(DRAFT_VOCAB) if reduced else target["vocab_size"],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True},
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_hidden_layers": 1,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    shapes = chain_shapes(target, ids, layer_shapes(target, "midlayer", wide=True, qk_norm=False))
    shapes["lm_head.weight"] = (config["draft_vocab_size"], target["hidden_size"])
    if embedding:
        shapes["embed_tokens.weight"] = (target["vocab_size"], target["hidden_size"])
    return config, shapes, vocabulary_tables(target) if reduced else {}
