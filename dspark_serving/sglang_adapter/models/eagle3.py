"""Eagle3's drafter on SGLang's layers (arXiv 2503.01840), as DeepSpec and the Llama-layout checkpoints have it.

Row i of a sequence takes a hidden state h_i and the token i + 1, at RoPE position i, and predicts token i + 2. h_i is
fc(features of the target at position i) for a committed row; a drafted row takes the layer's output of the row before
it, as it is before the final norm.

Legend of shape suffixes: N rows, D hidden size, M features of a position (captured layers times the target's hidden
size), V ids of the head, K key-value heads, E head size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from sglang.srt.configs.draft_parallel import DraftParallelSpec, DraftTPExecution
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import QKVParallelLinear, ReplicatedLinear
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.models.llama import LlamaAttention, LlamaMLP
from sglang.srt.models.utils import apply_qk_norm
from sglang.srt.utils.hf_transformers_utils import get_rope_config
from torch import Tensor, nn

from dspark_serving.drafters import canonical_names
from dspark_serving.errors import CheckpointError

ARCHITECTURE = "DsparkServingEagle3Drafter"

# Weights of the checkpoint that SGLang keeps in one parameter: (part of its name, name here, shard).
_STACKED: tuple[tuple[str, str, str | int], ...] = (
    (".q_proj.", ".qkv_proj.", "q"),
    (".k_proj.", ".qkv_proj.", "k"),
    (".v_proj.", ".qkv_proj.", "v"),
    (".gate_proj.", ".gate_up_proj.", 0),
    (".up_proj.", ".gate_up_proj.", 1),
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
        self.qkv_proj = QKVParallelLinear(
            2 * config.hidden_size,
            self.head_dim,
            self.total_num_heads,
            self.total_num_kv_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
        )
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


class Eagle3Layer(nn.Module):
    """The drafter's only decoder layer."""

    def __init__(self, config: Any, quant_config: Any) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps=eps)
        self.hidden_norm = RMSNorm(d, eps=eps)
        self.self_attn = Eagle3Attention(config, quant_config)
        self.post_attention_layernorm = RMSNorm(d, eps=eps)
        self.mlp = LlamaMLP(d, config.intermediate_size, config.hidden_act, quant_config)
        self._norm_before_residual = bool(config.norm_before_residual)

    def attention_input(self, embeds_ND: Tensor, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the attention [N, 2 D] and the residual [N, D]."""
        normed_ND = self.hidden_norm(hidden_ND)
        inputs = torch.cat([self.input_layernorm(embeds_ND), normed_ND], dim=-1)
        return inputs, normed_ND if self._norm_before_residual else hidden_ND

    def forward(
        self, positions: Tensor, embeds_ND: Tensor, hidden_ND: Tensor, forward_batch: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """Output [N, D] and the residual that is still to be added to it."""
        inputs, residual_ND = self.attention_input(embeds_ND, hidden_ND)
        attended_ND = self.self_attn(positions, inputs, forward_batch)
        attended_ND, residual_ND = self.post_attention_layernorm(attended_ND, residual_ND)
        return self.mlp(attended_ND), residual_ND


class DsparkServingEagle3Drafter(nn.Module):
    """An Eagle3 drafter by its canonical config.json (drafters/view.py)."""

    draft_parallel_spec = DraftParallelSpec(tp_execution=DraftTPExecution.SINGLE_GROUP)
    # What SGLang's DSpark worker asks of every drafter; an Eagle3 has none of these parts.
    sample_from_anchor = True
    supports_pre_gather_target_hidden_projection = False
    markov_head = None
    confidence_head = None

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        if config.layer_kind not in ("qwen3", "llama") or config.num_hidden_layers != 1:
            raise CheckpointError(
                f"an Eagle3 drafter of {config.num_hidden_layers} layers of the kind {config.layer_kind!r}",
                expected="one layer, as Qwen3 or Llama have it",
                fix="Use another drafter.",
            )
        self.config = config
        rows = getattr(config, "draft_vocab_size", None) or config.vocab_size
        self.fc = ReplicatedLinear(
            len(config.target_layer_ids) * config.target_hidden_size, config.hidden_size, bias=False
        )
        self.layers = nn.ModuleList([Eagle3Layer(config, quant_config)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.embed_tokens: Any = None  # these two, unless they are its own, are the target's
        self.lm_head: Any = None
        if config.own_embedding:
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        if config.own_head:
            self.lm_head = ParallelLMHead(rows, config.hidden_size)
        head_config = copy.copy(config)
        head_config.vocab_size = rows if config.own_head else config.vocab_size
        self.logits_processor = LogitsProcessor(head_config)

    def attach_shared_modules(self, *, embed_tokens: nn.Module, lm_head: nn.Module) -> None:
        """Take the target's embedding and head, where the drafter brings none of its own."""
        self.embed_tokens = self.embed_tokens or embed_tokens
        self.lm_head = self.lm_head or lm_head

    def hidden_of(self, features_NM: Tensor) -> Tensor:
        """h [N, D] of committed positions, by the target's features there."""
        return self.fc(features_NM.to(self.fc.weight.dtype))[0]

    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch) -> LogitsProcessorOutput:
        """One drafting step: logits [N, V] and the layer's output [N, D] for rows of tokens (`input_ids`) and h.

        h [N, D] comes as `forward_batch.input_embeds`, the field that every SGLang backend leaves to the model. It is
        missing only when SGLang warms its kernels up.
        """
        embeds_ND = self.embed_tokens(input_ids)
        hidden_ND = torch.zeros_like(embeds_ND) if forward_batch.input_embeds is None else forward_batch.input_embeds
        output_ND, residual_ND = self.layers[0](positions, embeds_ND, hidden_ND, forward_batch)
        normed_ND, output_ND = self.norm(output_ND, residual_ND)
        return self.logits_processor(input_ids, normed_ND, self.lm_head, forward_batch, aux_hidden_states=[output_ND])

    def write_rows(
        self, pool: Any, features_NM: Tensor, next_tokens_N: Tensor, positions_N: Tensor, cache_loc_N: Tensor
    ) -> None:
        """Write keys and values of committed rows.

        They depend on their own row only, because there is one layer: no attention is computed for them.
        """
        layer = cast(Eagle3Layer, self.layers[0])
        inputs, _ = layer.attention_input(self.embed_tokens(next_tokens_N), self.hidden_of(features_NM))
        attention = layer.self_attn
        _, k, v = attention.forward_prepare_native(positions_N, inputs)
        k_NKE, v_NKE = (x.reshape(len(x), attention.num_kv_heads, attention.head_dim) for x in (k, v))
        kept = attention.attn
        pool.set_kv_buffer(kept, KVWriteLoc(cache_loc_N, physical=True), k_NKE, v_NKE, kept.k_scale, kept.v_scale)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load a checkpoint of the format that config.json names; `check_weights` has seen that it is complete.

        Raises:
            CheckpointError: a weight has no place here.
        """
        rename = canonical_names(self.config.dspark_format)
        parameters = dict(self.named_parameters())
        for published, tensor in weights:
            name = rename(published)
            if name is None or (name in ("lm_head.weight", "embed_tokens.weight") and name not in parameters):
                continue  # a frozen copy of the target's
            shard: tuple[str | int, ...] = ()
            for part, stacked, which in _STACKED:
                if part in name:
                    name, shard = name.replace(part, stacked), (which,)
                    break
            if name not in parameters:
                raise CheckpointError(
                    f"the drafter holds an unknown weight {published}",
                    expected="the weights of an Eagle3 drafter",
                    fix="Check that config.json and weights belong together.",
                )
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *shard)
