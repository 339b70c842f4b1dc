"""Block drafters written out in plain torch, one position after the other: what the served ones are compared with.

Reads a canonical directory and knows nothing of the package but its file format. Shapes: T context tokens, K rows of a
block, D hidden size, H heads, E head width, V vocabulary, M captured features, G drafted tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, sigmoid, silu


class Block(NamedTuple):
    """A greedily drafted block."""

    tokens: list[int]
    confidence: list[float]  # empty without a confidence head


class BlockReference:
    """The drafter in the canonical directory `path`.

    Args:
        embedding_VD: the target's embedding, as stored.
        head_VD: the target's output head; a drafter with `own_head` brings its own.
        rename: canonical name of a weight by the name in the file.
    """

    def __init__(
        self,
        path: Path,
        embedding_VD: Tensor,
        head_VD: Tensor,
        rename: Callable[[str], str | None] = lambda name: name,
    ) -> None:
        self.config = json.loads((path / "config.json").read_text())
        self.weights = {rename(name) or name: rows for name, rows in load_file(path / "model.safetensors").items()}
        own = self.weights["embed_tokens.weight"] if self.config["own_embedding"] else embedding_VD
        self._embedding_VD = own.float() * self.config.get("embed_scale", 1.0)
        self._head_VD = head_VD.float()
        self._ids: Tensor | None = None
        if "draft_vocab_size" in self.config:
            self._ids = torch.tensor(json.loads((path / "draft_vocab.json").read_text())["token_ids"])

    @torch.no_grad()
    def draft(self, features_TM: Tensor, anchor_id: int) -> Block:
        """The block behind an anchor whose context are the features of every token before it."""
        gamma, skip = self.config["block_size"], 0 if self.config["sample_from_anchor"] else 1
        ids = [anchor_id] + [self.config["mask_token_id"]] * (gamma - 1 + skip)
        context_TD = self._norm(features_TM.float() @ self.weights["fc.weight"].T, "hidden_norm.weight")
        stream_KD = self._embedding_VD[ids]
        for index in range(self.config["num_hidden_layers"]):
            seen_KL = self._seen(index, len(context_TD), len(ids))
            stream_KD = self._layer(f"layers.{index}", stream_KD, context_TD, seen_KL)
        return self._chain(self._norm(stream_KD, "norm.weight")[skip:], anchor_id)

    def _seen(self, layer: int, context: int, rows: int) -> Tensor:
        """Which positions (context, then block) each row of the block sees: [K, T + K]."""
        windowed = self.config.get("layer_types", ["full_attention"] * (layer + 1))[layer] == "sliding_attention"
        seen_KL = torch.ones(rows, context + rows, dtype=torch.bool)
        for row in range(rows):
            for position in range(context + rows):
                behind = context + row - position
                if windowed and behind >= self.config["sliding_window"]:
                    seen_KL[row, position] = False
                if behind < 0 and self.config.get("is_causal", windowed):
                    seen_KL[row, position] = False
        return seen_KL

    def _layer(self, name: str, stream_KD: Tensor, context_TD: Tensor, seen_KL: Tensor) -> Tensor:
        rows_KD = self._norm(stream_KD, f"{name}.input_layernorm.weight")
        attended = self._attention(f"{name}.self_attn", rows_KD, context_TD, seen_KL)
        if self.config["layer_kind"] == "gemma4":
            stream_KD = stream_KD + self._norm(attended, f"{name}.post_attention_layernorm.weight")
            fed = self._mlp(f"{name}.mlp", self._norm(stream_KD, f"{name}.pre_feedforward_layernorm.weight"))
            stream_KD = stream_KD + self._norm(fed, f"{name}.post_feedforward_layernorm.weight")
            return stream_KD * self.weights[f"{name}.layer_scalar"]
        stream_KD = stream_KD + attended
        return stream_KD + self._mlp(f"{name}.mlp", self._norm(stream_KD, f"{name}.post_attention_layernorm.weight"))

    def _attention(self, name: str, rows_KD: Tensor, context_TD: Tensor, seen_KL: Tensor) -> Tensor:
        kind, width = self.config["layer_kind"], self.config["head_dim"]
        everything = torch.cat([context_TD, rows_KD])
        q = self._heads(f"{name}.q_proj", rows_KD)
        k = self._heads(f"{name}.k_proj", everything)
        v = k if self.config.get("attention_k_eq_v") else self._heads(f"{name}.v_proj", everything)
        if kind != "llama":
            q, k = self._norm(q, f"{name}.q_norm.weight"), self._norm(k, f"{name}.k_norm.weight")
        if kind == "gemma4":
            v = self._norm(v, None)
        q, k = self._rotated(q, first=len(context_TD)), self._rotated(k, first=0)
        scale = 1.0 if kind == "gemma4" else width**-0.5
        group = q.shape[1] // k.shape[1]
        out = []
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // group].T * scale
            out.append(scores.masked_fill(~seen_KL, -math.inf).softmax(-1) @ v[:, head // group])
        return self._linear(f"{name}.o_proj", torch.cat(out, dim=-1))

    def _heads(self, name: str, rows: Tensor) -> Tensor:
        return self._linear(name, rows).unflatten(-1, (-1, self.config["head_dim"]))

    def _rotated(self, x_RHE: Tensor, *, first: int) -> Tensor:
        """Rotate pairs (i, i + E/2) by position * theta^(-2i/E); a proportional type only the first of them."""
        rope, width = self.config["rope_parameters"], self.config["head_dim"]
        pairs = torch.arange(width // 2)
        frequency = rope["rope_theta"] ** (-2.0 * pairs / width)
        if rope["rope_type"] == "proportional":
            frequency = torch.where(pairs < rope["partial_rotary_factor"] * width / 2, frequency, 0.0)
        angles = (first + torch.arange(len(x_RHE)))[:, None, None] * frequency
        low, high = x_RHE.chunk(2, dim=-1)
        return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], dim=-1)

    def _mlp(self, name: str, rows: Tensor) -> Tensor:
        gate = self._linear(f"{name}.gate_proj", rows)
        gate = gelu(gate, approximate="tanh") if self.config["hidden_act"] == "gelu_pytorch_tanh" else silu(gate)
        return self._linear(f"{name}.down_proj", gate * self._linear(f"{name}.up_proj", rows))

    def _linear(self, name: str, rows: Tensor) -> Tensor:
        out = rows @ self.weights[f"{name}.weight"].T
        return out + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else out

    def _norm(self, x: Tensor, weight: str | None) -> Tensor:
        normal = x * (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return normal if weight is None else normal * self.weights[weight]

    def _chain(self, hidden_GD: Tensor, anchor_id: int) -> Block:
        """Tokens left to right, each with the Markov bias of the one before it."""
        previous, tokens, confidence = anchor_id, [], []
        state = torch.zeros(self.config["markov_rank"])
        for row in hidden_GD:
            logits = self._base_logits(row)
            if self.config["markov_rank"]:
                bias, state = self._bias(previous, row, state)
                logits = logits + bias
            if self._ids is not None:
                allowed = torch.full_like(logits, -math.inf)
                allowed[self._ids] = 0.0
                logits = logits + allowed
            if self.config["enable_confidence_head"]:
                seen = row
                if self.config["confidence_head_with_markov"]:
                    seen = torch.cat([row, self.weights["markov_head.markov_w1.weight"][previous]])
                confidence.append(float(sigmoid(self._linear("confidence_head.proj", seen))))
            previous = int(logits.argmax())
            tokens.append(previous)
        return Block(tokens, confidence)

    def _base_logits(self, row: Tensor) -> Tensor:
        if self.config["own_head"]:
            logits = torch.full((self.config["vocab_size"],), -math.inf)
            own = self.weights["lm_head.weight"] @ row
            logits[self._ids if self._ids is not None else slice(None)] = own
        else:
            logits = self._head_VD @ row
        cap = self.config.get("final_logit_softcapping")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _bias(self, previous: int, row: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.weights["markov_head.markov_w1.weight"][previous]
        kind = self.config["markov_head_type"]
        if kind == "gated":
            latent = sigmoid(self._linear("markov_head.gate_proj", torch.cat([row, latent]))) * latent
        if kind == "rnn":
            gate, candidate, output = self._linear("markov_head.joint_proj", torch.cat([state, latent, row])).chunk(3)
            state = sigmoid(gate) * state + (1 - sigmoid(gate)) * candidate.tanh()
            latent = output.tanh()
        bias_N = self.weights["markov_head.markov_w2.weight"] @ latent
        if len(bias_N) == self.config["vocab_size"]:
            return bias_N, state
        bias_V = torch.zeros(self.config["vocab_size"])
        bias_V[self._ids] = bias_N
        return bias_V, state
