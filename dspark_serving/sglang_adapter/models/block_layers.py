"""Draft layers of each kind: how a decoder layer of the drafter normalises and projects.

Sources: DFlash (arXiv 2602.06036) for the injected keys and values; DeepSpec (2026-06-30) for the Gemma4 kind.
Shapes: T query rows of the batch, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.layernorm import Gemma4RMSNorm, RMSNorm
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.models.dflash import DFlashAttention, DFlashDecoderLayer
from sglang.srt.models.gemma3_causal import Gemma3MLP
from torch import Tensor, nn


class PlainAttention(DFlashAttention):
    """Without norms of queries, keys or values, as Llama's."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        del self.q_norm, self.k_norm
        self.use_table_qk_norm_rope = False

    def forward(self, positions: Tensor, hidden_states: Tensor, forward_batch: Any) -> Tensor:
        """Attention output [T, D] of the forward's rows; the context is in the cache."""
        out, _ = self.o_proj(self.attn(*self.forward_prepare_native(positions, hidden_states), forward_batch))
        return out

    def forward_prepare_native(self, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, normed and rotated; the name is that of SGLang's Llama."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, self.normalize_query(q), self.apply_k_norm(k))
        return q, k, self.normalize_value(v)

    def kv_proj_only(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of context rows, before the keys' norm and rotation."""
        k, v = super().kv_proj_only(hidden_states)
        return k, self.normalize_value(v)

    def normalize_query(self, q: Tensor) -> Tensor:
        return q

    def apply_k_norm(self, k: Tensor) -> Tensor:
        return k

    def normalize_value(self, v: Tensor) -> Tensor:
        return v


class Gemma4Attention(PlainAttention):
    """Normalised queries, keys and values, unscaled scores; values may be the unrotated keys (`attention_k_eq_v`)."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        eps = config.rms_norm_eps
        self.q_norm = RMSNorm(self.head_dim, eps=eps)
        self.k_norm = RMSNorm(self.head_dim, eps=eps)
        self.v_norm = Gemma4RMSNorm(self.head_dim, eps=eps, with_scale=False)
        self.scaling = self.attn.scaling = 1.0
        rope = config.rope_parameters
        self.rotary_emb = get_rope(
            self.head_dim,
            rotary_dim=self.head_dim,
            max_position=config.max_position_embeddings,
            base=rope["rope_theta"],
            rope_scaling={"rope_type": rope["rope_type"]},
            partial_rotary_factor=rope.get("partial_rotary_factor", 1.0),
        )

    def normalize_query(self, q: Tensor) -> Tensor:
        return self._by_head(self.q_norm, q)

    def apply_k_norm(self, k: Tensor) -> Tensor:
        return self._by_head(self.k_norm, k)

    def normalize_value(self, v: Tensor) -> Tensor:
        return self._by_head(self.v_norm, v)

    def _by_head(self, norm: nn.Module, rows: Tensor) -> Tensor:
        normalized: Tensor = norm(rows.reshape(-1, self.head_dim))
        return normalized.view(rows.shape)


class LlamaLayer(DFlashDecoderLayer):
    """A pre-norm decoder layer as Llama's."""

    attention_cls = PlainAttention


class Gemma4Parts(nn.Module):
    """Norms around attention and MLP, and a factor on the whole stream."""

    attention_cls = Gemma4Attention

    def __init__(
        self, *, config: Any, layer_id: int, quant_config: Any = None, prefix: str = "", **convolutions: None
    ) -> None:
        super().__init__()
        self.self_attn = self.attention_cls(config=config, layer_id=layer_id, quant_config=quant_config, prefix=prefix)
        self.mlp = Gemma3MLP(config.hidden_size, config.intermediate_size, config.hidden_act, quant_config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layer_scalar = nn.Parameter(torch.ones(1), requires_grad=False)

    def after_attention(self, attended: Tensor, residual: Tensor) -> Tensor:
        """The stream [T, D] after this layer, by the output of its attention and the stream before."""
        stream = residual + self.post_attention_layernorm(attended)
        stream = stream + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(stream)))
        return stream * self.layer_scalar


class Gemma4Layer(Gemma4Parts):
    """A layer of a block drafter."""

    def forward(self, positions: Tensor, hidden_states: Tensor, forward_batch: Any, residual: None) -> Any:
        """The stream [T, D] after this layer, and no separate residual."""
        if hidden_states.numel() == 0:
            return hidden_states, None
        attended = self.self_attn(positions, self.input_layernorm(hidden_states), forward_batch)
        return self.after_attention(attended, hidden_states), None


LAYER_KINDS: dict[str, type[nn.Module]] = {"qwen3": DFlashDecoderLayer, "llama": LlamaLayer, "gemma4": Gemma4Layer}
