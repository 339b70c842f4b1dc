"""Eagle3's drafter on SGLang's layers (arXiv 2503.01840), as DeepSpec and the Llama-layout checkpoints have it.

Row i of a sequence takes a hidden state h_i and the token i + 1, at RoPE position i, and predicts token i + 2. h_i is
fc(features of the target at position i) for a committed row; a drafted row takes the layer's output of the row before
it, as it is before the final norm.

Legend of shape suffixes: N rows, D hidden size, M features of a position (captured layers times the target's hidden
size), V ids of the head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from sglang.srt.configs.draft_parallel import DraftParallelSpec, DraftTPExecution
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import Tensor, nn

from dspark_serving.drafters.weights import TARGET_COPIES
from dspark_serving.errors import CheckpointError
from dspark_serving.sglang_adapter.models.eagle3_layers import EAGLE3_LAYERS, ChainLayer
from dspark_serving.sglang_adapter.models.shared import canonical_weights, scaled_as_trained

ARCHITECTURE = "DsparkServingEagle3Drafter"

# Weights of the checkpoint that SGLang keeps in one parameter: (part of its name, name here, shard).
_STACKED: tuple[tuple[str, str, str | int], ...] = (
    (".q_proj.", ".qkv_proj.", "q"),
    (".k_proj.", ".qkv_proj.", "k"),
    (".v_proj.", ".qkv_proj.", "v"),
    (".gate_proj.", ".gate_up_proj.", 0),
    (".up_proj.", ".gate_up_proj.", 1),
)


_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


class HeadRows(nn.Module):
    """Some rows of a head, in the form that SGLang's logits processor takes."""

    def __init__(self, weight_UD: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_UD, requires_grad=False)


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
        self.config = config
        rows = getattr(config, "draft_vocab_size", None) or config.vocab_size
        self.fc = ReplicatedLinear(
            len(config.target_layer_ids) * config.target_hidden_size, config.hidden_size, bias=False
        )
        self.layers = nn.ModuleList([EAGLE3_LAYERS[config.layer_kind](config, quant_config)])
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
        self.embed_tokens = scaled_as_trained(self.embed_tokens or embed_tokens, self.config)
        self.lm_head = self.lm_head or lm_head

    def cut_head(self, token_ids_U: Tensor) -> bool:
        """From now on multiply with the rows of these ids only, of a head that has a row for every token.

        False, and nothing changes, where the head is not whole on this rank or its weight is not a plain matrix
        (quantised, or packed for Intel's AMX).
        """
        weight = getattr(self.lm_head, "weight", None)
        packed = getattr(self.lm_head, "use_intel_amx_backend", False)
        if weight is None or packed or weight.dtype not in _PLAIN or len(weight) < self.config.vocab_size:
            return False
        self.lm_head = HeadRows(weight.data[token_ids_U])
        self.logits_processor.vocab_size = len(token_ids_U)
        return True

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
        output_ND = self.layers[0](positions, embeds_ND, hidden_ND, forward_batch)
        return self.logits_processor(
            input_ids, self.norm(output_ND), self.lm_head, forward_batch, aux_hidden_states=[output_ND]
        )

    def write_rows(
        self, pool: Any, features_NM: Tensor, next_tokens_N: Tensor, positions_N: Tensor, cache_loc_N: Tensor
    ) -> None:
        """Write keys and values of committed rows.

        They depend on their own row only, because there is one layer: no attention is computed for them.
        """
        layer = cast(ChainLayer, self.layers[0])
        k, v = layer.keys_values(positions_N, self.embed_tokens(next_tokens_N), self.hidden_of(features_NM))
        kept = layer.self_attn.attn
        pool.set_kv_buffer(kept, KVWriteLoc(cache_loc_N, physical=True), k, v, kept.k_scale, kept.v_scale)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load a checkpoint of the format that config.json names; `check_weights` has seen that it is complete.

        Raises:
            CheckpointError: a weight has no place here.
        """
        parameters = dict(self.named_parameters())
        for name, tensor in canonical_weights(weights, self.config):
            if name in TARGET_COPIES and name not in parameters:
                continue
            shard: tuple[str | int, ...] = ()
            for part, stacked, which in _STACKED:
                if part in name:
                    name, shard = name.replace(part, stacked), (which,)
                    break
            if name not in parameters:
                raise CheckpointError(
                    f"the drafter holds an unknown weight {name}",
                    expected="the weights of an Eagle3 drafter",
                    fix="Check that config.json and weights belong together.",
                )
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *shard)
