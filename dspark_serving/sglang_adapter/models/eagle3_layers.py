"""Eagle3's decoder layer of each kind: its attention takes a token's embedding and h side by side.

Sources: EAGLE-3 (arXiv 2503.01840); DeepSpec (2026-06-30) for the Gemma4 kind.
Legend of shape suffixes: N rows, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.llama import LlamaAttention, LlamaMLP
from sglang.srt.models.utils import apply_qk_norm
from sglang.srt.utils.hf_transformers_utils import get_rope_config
from torch import Tensor, nn

from dspark_serving.sglang_adapter.models.block_layers import Gemma4Attention, Gemma4Parts


def _wide_projection(attention: Any, bias: bool, quant_config: Any) -> QKVParallelLinear:
    """Queries, keys and values of inputs [N, 2 D]."""
    return QKVParallelLinear(
        2 * attention.hidden_size,
        attention.head_dim,
        attention.total_num_heads,
        attention.total_num_kv_heads,
        bias=bias,
        quant_config=quant_config,
    )


class Eagle3Attention(LlamaAttention):
    """Llama's attention over inputs of twice the hidden size, with norms of queries and keys where they are trained."""

    def __init__(self, config: Any, quant_config: Any) -> None:
        rope_theta, rope_scaling = get_rope_config(config)
        super().__init__(
            config,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=quant_config,
            bias=config.attention_bias,
        )
        self.qkv_proj = _wide_projection(self, config.attention_bias, quant_config)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward_prepare_native(self, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of inputs [N, 2 D], normed and rotated."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.q_norm is not None:
            q, k = apply_qk_norm(q=q, k=k, q_norm=self.q_norm, k_norm=self.k_norm, head_dim=self.head_dim)
        q, k = self.rotary_emb(positions, q, k)
        return q, k, v


class Gemma4Eagle3Attention(Gemma4Attention):
    """Gemma 4's attention over inputs of twice the hidden size; each row sees what lies before it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.attn.attn_type = AttentionType.DECODER  # a block's rows see each other, a chain's do not

    def _build_qkv_proj(self, bias: bool, quant_config: Any, prefix: str) -> QKVParallelLinear:
        return _wide_projection(self, bias, quant_config)


class ChainLayer(nn.Module):
    """What the kinds have in common."""

    input_layernorm: nn.Module
    hidden_norm: nn.Module
    self_attn: Any
    norm_before_residual: bool

    def attention_input(self, embeds_ND: Tensor, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the attention [N, 2 D] and the residual [N, D]."""
        normed_ND = self.hidden_norm(hidden_ND)
        inputs = torch.cat([self.input_layernorm(embeds_ND), normed_ND], dim=-1)
        return inputs, normed_ND if self.norm_before_residual else hidden_ND

    def forward(self, positions: Tensor, embeds_ND: Tensor, hidden_ND: Tensor, forward_batch: ForwardBatch) -> Tensor:
        """The layer's output [N, D]."""
        inputs, residual_ND = self.attention_input(embeds_ND, hidden_ND)
        return self.after_attention(self.self_attn(positions, inputs, forward_batch), residual_ND)

    def after_attention(self, attended: Tensor, residual: Tensor) -> Tensor:
        """The layer's output, by its attention's and the residual."""
        raise NotImplementedError

    def keys_values(self, positions: Tensor, embeds_ND: Tensor, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they stand in the cache, [N, key-value heads, head size] each."""
        inputs, _ = self.attention_input(embeds_ND, hidden_ND)
        attention = self.self_attn
        _, k, v = attention.forward_prepare_native(positions, inputs)
        k, v = (x.reshape(len(x), attention.num_kv_heads, attention.head_dim) for x in (k, v))
        return k, v


class Eagle3Layer(ChainLayer):
    """A pre-norm layer as Qwen3 and Llama have it."""

    def __init__(self, config: Any, quant_config: Any) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps=eps)
        self.hidden_norm = RMSNorm(d, eps=eps)
        self.self_attn = Eagle3Attention(config, quant_config)
        self.post_attention_layernorm = RMSNorm(d, eps=eps)
        self.mlp = LlamaMLP(d, config.intermediate_size, config.hidden_act, quant_config)
        self.norm_before_residual = bool(config.norm_before_residual)

    def after_attention(self, attended: Tensor, residual: Tensor) -> Tensor:
        normed, residual = self.post_attention_layernorm(attended, residual)
        fed: Tensor = self.mlp(normed)
        return fed + residual


class Gemma4Eagle3Layer(Gemma4Parts, ChainLayer):
    """Gemma 4's layer behind the wide attention."""

    attention_cls = Gemma4Eagle3Attention

    def __init__(self, config: Any, quant_config: Any) -> None:
        super().__init__(config=config, layer_id=0, quant_config=quant_config)
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_before_residual = bool(config.norm_before_residual)


EAGLE3_LAYERS: dict[str, type[ChainLayer]] = {
    "qwen3": Eagle3Layer,
    "llama": Eagle3Layer,
    "gemma4": Gemma4Eagle3Layer,
}
