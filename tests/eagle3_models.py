"""Tiny Eagle3 drafters in canonical directories, and what they draft by their definition: no cache, no batch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, linear, silu
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from dspark_serving.drafters import canonical_names
from tests.tiny_models import make_tiny_target, write_drafter

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def make_eagle3(
    path: Path, target_config: dict[str, Any], *, draft_vocab: list[int] | None = None, seed: int = 2, **overrides: Any
) -> dict[str, Tensor]:
    """Write a random drafter for a target, `overrides` in its config.json; returns its weights."""
    depth = target_config["num_hidden_layers"]
    config = {
        "architectures": ["DsparkServingEagle3Drafter"],
        "model_type": "qwen3",
        "dspark_format": "dspark-serving",
        "family": "eagle3",
        "layer_kind": "qwen3",
        "hidden_size": target_config["hidden_size"],
        "target_hidden_size": target_config["hidden_size"],
        "intermediate_size": 64,
        "head_dim": 16,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "attention_bias": False,
        "qk_norm": True,
        "norm_before_residual": False,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": PLAIN_ROPE,
        "max_position_embeddings": 2048,
        "vocab_size": target_config["vocab_size"],
        "dtype": "float32",
        "num_target_layers": depth,
        "block_size": 4,
        "sample_from_anchor": True,
        "target_layer_ids": list(range(depth - 1)),
        "markov_rank": 0,
        "enable_confidence_head": False,
        "own_head": False,
        "own_embedding": False,
        **overrides,
    }
    return write_drafter(path, config, draft_vocab, seed=seed)


class Block(NamedTuple):
    """A greedily drafted block."""

    tokens: list[int]
    probabilities: list[float]  # the drafter's, of each token


class Drafter(NamedTuple):
    """A drafter's files beside its target, as plain tensors."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    embedding_VD: Tensor  # scaled as the config says
    head_VD: Tensor
    allowed: Tensor | None  # ids of the head's rows

    @staticmethod
    def read(path: Path, target: PreTrainedModel) -> Drafter:
        """The drafter in a canonical directory."""
        config = json.loads((path / "config.json").read_text())
        rename = canonical_names(config["dspark_format"])
        named = ((rename(name), weight) for name, weight in load_file(path / "model.safetensors").items())
        weights = {name: weight for name, weight in named if name is not None}
        vocabulary = path / "draft_vocab.json"
        allowed = torch.tensor(json.loads(vocabulary.read_text())["token_ids"]) if vocabulary.exists() else None
        own_head, own_embedding = config["own_head"], config["own_embedding"]
        embedding = weights["embed_tokens.weight"] if own_embedding else target.get_input_embeddings().weight
        head = weights["lm_head.weight"] if own_head else target.get_output_embeddings().weight
        if allowed is not None and not own_head:
            head = head[allowed]
        return Drafter(config, weights, embedding * config.get("embed_scale", 1.0), head, allowed)

    def draft(self, ids: list[int], features_TM: Tensor) -> Block:
        """Greedy block behind the anchor, the last of `ids`; features of every token before it."""
        hidden_TD = linear(features_TM, self.weights["fc.weight"])
        tokens = ids[1:]  # row i has token i + 1
        drafted = Block([], [])
        for _ in range(self.config["block_size"]):
            output_D = self._layer(hidden_TD, self.embedding_VD[tokens])[-1]
            probability, best = self._logits(output_D).softmax(-1).max(-1)
            drafted.tokens.append(int(best if self.allowed is None else self.allowed[best]))
            drafted.probabilities.append(float(probability))
            hidden_TD, tokens = torch.cat([hidden_TD, output_D[None]]), [*tokens, drafted.tokens[-1]]
        return drafted

    def _logits(self, output_D: Tensor) -> Tensor:
        logits_V = self.head_VD @ self._norm(output_D, "norm")
        cap = self.config.get("final_logit_softcapping")
        return logits_V if cap is None else cap * torch.tanh(logits_V / cap)

    def _layer(self, hidden_TD: Tensor, embeds_TD: Tensor) -> Tensor:
        normed_TD = self._norm(hidden_TD, "layers.0.hidden_norm")
        residual_TD = normed_TD if self.config["norm_before_residual"] else hidden_TD
        inputs = torch.cat([self._norm(embeds_TD, "layers.0.input_layernorm"), normed_TD], dim=-1)
        attended_TD = self._attention(inputs)
        if self.config["layer_kind"] == "gemma4":
            residual_TD = residual_TD + self._norm(attended_TD, "layers.0.post_attention_layernorm")
            fed_TD = self._mlp(self._norm(residual_TD, "layers.0.pre_feedforward_layernorm"))
            residual_TD = residual_TD + self._norm(fed_TD, "layers.0.post_feedforward_layernorm")
            return residual_TD * self.weights["layers.0.layer_scalar"]
        residual_TD = residual_TD + attended_TD
        return residual_TD + self._mlp(self._norm(residual_TD, "layers.0.post_attention_layernorm"))

    def _mlp(self, inner_TD: Tensor) -> Tensor:
        gate, up = (self._linear(inner_TD, f"mlp.{name}_proj") for name in ("gate", "up"))
        gate = gelu(gate, approximate="tanh") if self.config["hidden_act"] == "gelu_pytorch_tanh" else silu(gate)
        return self._linear(gate * up, "mlp.down_proj")

    def _attention(self, inputs: Tensor) -> Tensor:
        heads, kv_heads, size = (
            self.config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        rows, gemma = len(inputs), self.config["layer_kind"] == "gemma4"
        sources = "qkk" if self.config.get("attention_k_eq_v") else "qkv"
        q, k, v = (self._linear(inputs, f"self_attn.{name}_proj").view(rows, -1, size) for name in sources)
        if gemma:
            v = self._norm(v, None)
        if self.config["qk_norm"]:
            q, k = (self._norm(x, f"layers.0.self_attn.{name}_norm") for x, name in ((q, "q"), (k, "k")))
        names = ("hidden_size", "head_dim", "num_attention_heads", "max_position_embeddings", "rope_parameters")
        rotary = LlamaRotaryEmbedding(LlamaConfig(**{name: self.config[name] for name in names}))
        cos, sin = rotary(inputs[None], torch.arange(rows)[None])
        q, k = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2))
        k, v = (x.repeat_interleave(heads // kv_heads, dim=0) for x in (k, v.transpose(0, 1)))
        hides = torch.ones(rows, rows).triu(1).bool()
        scale = 1.0 if gemma else 1.0 / math.sqrt(size)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hides, -math.inf)
        return self._linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(rows, -1), "self_attn.o_proj")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.weights[f"layers.0.{name}.weight"], self.weights.get(f"layers.0.{name}.bias"))

    def _norm(self, x: Tensor, name: str | None) -> Tensor:
        normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return normal if name is None else normal * self.weights[f"{name}.weight"]


class Decoded(NamedTuple):
    tokens: list[int]  # everything after the prompt
    drafts: list[list[int]]  # one block a round that drafts
    accepted: list[int]  # accepted drafts of those rounds, without the bonus token
    probabilities: list[list[float]]  # the drafter's, of each draft


def always(context: int) -> bool:
    """Draft in every round."""
    return True


@torch.no_grad()
def speculative_decode(
    drafter: Drafter,
    target: PreTrainedModel,
    prompt: list[int],
    max_new_tokens: int,
    drafts_at: Callable[[int], bool] = always,
) -> Decoded:
    """Greedy rounds, with a draft where `drafts_at` says so of the tokens before the anchor; no cache of any kind."""

    def run(ids: list[int]) -> tuple[list[int], Tensor]:
        out = target(torch.tensor([ids]), output_hidden_states=True)
        features = torch.cat([out.hidden_states[i + 1] for i in drafter.config["target_layer_ids"]], dim=-1)
        return out.logits[0].argmax(-1).tolist(), features[0]

    ids = [*prompt, run(prompt)[0][-1]]  # prefill draws the first anchor
    drafts, accepted, probabilities = [], [], []
    while len(ids) - len(prompt) < max_new_tokens:
        best, features = run(ids)
        if not drafts_at(len(ids) - 1):
            ids.append(best[-1])
            continue
        draft, probability = drafter.draft(ids, features[:-1])
        best = run(ids + draft)[0][len(ids) - 1 :]
        drafts.append(draft)
        probabilities.append(probability)
        accepted.append(next((k for k, token in enumerate(draft) if token != best[k]), len(draft)))
        ids += [*draft[: accepted[-1]], best[accepted[-1]]]
    return Decoded(ids[len(prompt) :][:max_new_tokens], drafts, accepted, probabilities)


def make_bigram_pair(target_path: Path, drafter_path: Path, arch: Literal["qwen3", "llama"], *, seed: int = 4) -> None:
    """A target whose next token hangs mostly on the last one, and a drafter that knows this and little else.

    The drafter's attention sees its own row only (constant queries and keys, apart by their rotation) and copies the
    token's embedding to the target's head; its features add noise. So some of what it drafts is accepted.
    """
    config = make_tiny_target(target_path, arch, seed=seed) | {"tie_word_embeddings": False}
    (target_path / "config.json").write_text(json.dumps(config, indent=2))
    weights = load_file(target_path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = 0.15 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(seed))
    for name, weight in weights.items():
        # The embedding outweighs what the layers add to it.
        weight *= 10.0 if "embed_tokens" in name else 0.3 if "o_proj" in name or "down_proj" in name else 1.0
    save_file(weights, target_path / "model.safetensors", {"format": "pt"})
    make_bigram_drafter(drafter_path, config)


def make_bigram_drafter(
    drafter_path: Path, config: dict[str, Any], *, sharpness: float = 1.0, embedding_VD: Tensor | None = None
) -> None:
    """The drafter of `make_bigram_pair`, for any target (its config.json) that follows its last token so.

    Args:
        sharpness: its logits, as a share of what the target's head makes of a token's embedding.
        embedding_VD: its own embedding, what it takes each token for; None for the target's.
    """
    d, size = config["hidden_size"], 16
    drafter = make_eagle3(
        drafter_path,
        config,
        num_key_value_heads=3,
        attention_bias=True,
        qk_norm=False,
        norm_before_residual=True,
        own_embedding=embedding_VD is not None,
    )
    if embedding_VD is not None:
        drafter["embed_tokens.weight"] = embedding_VD
    attention = {name: drafter[f"layers.0.self_attn.{name}_proj.weight"].zero_() for name in "qkvo"}
    attention["v"][:, :d] = torch.eye(d)
    for head in range(3):  # of the two query heads of each key-value head the first
        own = slice(size * head, size * (head + 1))
        attention["o"][own, 2 * size * head : 2 * size * head + size] = torch.eye(size)
    for name in "qkvo":
        bias = drafter[f"layers.0.self_attn.{name}_proj.bias"].zero_()
        if name in "qk":
            bias.view(-1, size)[:, : size // 2] = 5.0
    for name, scale in {"input_layernorm": 1.0, "hidden_norm": 0.2, "post_attention_layernorm": 1.0}.items():
        drafter[f"layers.0.{name}.weight"].fill_(scale)
    drafter["layers.0.mlp.down_proj.weight"] *= 0.3
    drafter["norm.weight"].fill_(sharpness)
    save_file(drafter, drafter_path / "model.safetensors")
