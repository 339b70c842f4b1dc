"""Tiny random targets and DeepSpec-format drafters, for tests that need a real server or a real reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dspark_serving.drafters import read_spec
from dspark_serving.drafters.weights import expected_shapes

VOCAB_SIZE = 512

Arch = Literal["qwen3", "qwen2", "llama", "gemma3", "gemma4"]

_CLASSES: dict[Arch, Any] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "gemma4": (Gemma4TextConfig, Gemma4ForCausalLM),
}
# A window that prompts of the tests exceed, in every other layer.
_SLIDING = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}
_PARTICULARS: dict[Arch, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {"head_dim": 8},  # Qwen2's is always hidden_size / heads
    "llama": {},
    "gemma3": {"query_pre_attn_scalar": 16, "pad_token_id": None} | _SLIDING,
    "gemma4": {
        "global_head_dim": 16,  # SGLang takes layers of two sizes from multimodal checkpoints only
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 8.0,
        "pad_token_id": None,
    }
    | _SLIDING,
}


def make_tiny_target(path: Path, arch: Arch = "qwen3", *, seed: int = 0) -> dict[str, Any]:
    """Write a random fp32 target with a byte-like tokenizer to `path`; returns its config.json."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": VOCAB_SIZE - 1,
        "dtype": "float32",
    }
    torch.manual_seed(seed)
    config_class, model_class = _CLASSES[arch]
    model = model_class(config_class(**sizes | _PARTICULARS[arch]))
    # The usual tiny initialisation gives nearly equal logits; larger weights give text that varies.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(path)
    write_tokenizer(path)
    return dict(json.loads((path / "config.json").read_text()))


def load_tiny_target(path: Path, arch: Arch) -> Any:
    """The target in `path` as transformers runs it."""
    return _CLASSES[arch][1].from_pretrained(path, dtype="float32").eval()


def make_tiny_drafter(
    path: Path,
    target_config: dict[str, Any],
    *,
    gamma: int = 4,
    layers: int = 2,
    markov_rank: int = 8,
    markov_head_type: str = "vanilla",
    confidence: bool = True,
    seed: int = 1,
    draft_vocab: list[int] | None = None,
    target_layer_ids: list[int] | None = None,
) -> dict[str, Any]:
    """Write a random drafter in DeepSpec's format for a target; returns its config.json.

    Args:
        draft_vocab: ids that it may propose, ascending; None for the whole vocabulary.
        target_layer_ids: None spreads up to five over the target's layers, without the last one.
    """
    depth = target_config["num_hidden_layers"]
    layer_ids = target_layer_ids or sorted({round(i * (depth - 2) / 4) for i in range(5)})
    config = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "hidden_size": target_config["hidden_size"],
        "intermediate_size": target_config["intermediate_size"],
        "head_dim": target_config["head_dim"],
        "num_attention_heads": target_config["num_attention_heads"],
        "num_key_value_heads": target_config["num_key_value_heads"],
        "rms_norm_eps": target_config["rms_norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": target_config["max_position_embeddings"],
        "vocab_size": target_config["vocab_size"],
        "num_hidden_layers": layers,
        "num_target_layers": depth,
        "block_size": gamma,
        "mask_token_id": 3,
        "target_layer_ids": layer_ids,
        "markov_rank": markov_rank,
        "markov_head_type": markov_head_type,
        "enable_confidence_head": confidence,
        "confidence_head_with_markov": confidence,
        "dtype": "float32",
    }
    write_drafter(path, config, draft_vocab, seed=seed)
    return config


def write_drafter(
    path: Path,
    config: dict[str, Any],
    draft_vocab: list[int] | None,
    *,
    seed: int,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, torch.Tensor]:
    """Write a drafter of random weights and the size of its `draft_vocab` into `config`; returns the weights.

    Args:
        shapes: of the weights; None for what the format's reader expects.
    """
    path.mkdir(parents=True, exist_ok=True)
    if draft_vocab is not None:
        config["draft_vocab_size"] = len(draft_vocab)
        (path / "draft_vocab.json").write_text(json.dumps({"token_ids": draft_vocab}))
    (path / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in (shapes or expected_shapes(read_spec(path))).items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = 1.0 + 0.1 * noise if "norm" in name else 0.15 * noise
    save_file(weights, path / "model.safetensors")
    return weights


def write_tokenizer(path: Path) -> None:
    """A tokenizer of single characters and numbered words, enough for prompts and readable answers."""
    vocab = {chr(32 + i): i for i in range(95)}
    vocab |= {f"w{i}": i for i in range(95, VOCAB_SIZE - 2)}
    vocab |= {"<unk>": VOCAB_SIZE - 2, "<eos>": VOCAB_SIZE - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    wrapped.save_pretrained(path)
