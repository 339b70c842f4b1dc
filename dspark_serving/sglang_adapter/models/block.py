"""The drafter that proposes a whole block: DSpark and DFlash, on SGLang's layers.

Its config.json is canonical: whatever the published format was, names and meanings are those of drafters/view.py.
Shapes: T query rows of the batch, D hidden size, V vocabulary, N ids that the drafter may propose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.models.dspark import BaseDSparkMarkovHead, DSparkDraftModel
from torch import Tensor, nn

from dspark_serving.sglang_adapter.models.block_layers import LAYER_KINDS
from dspark_serving.sglang_adapter.models.shared import canonical_weights, scaled_as_trained

ARCHITECTURE = "DsparkServingBlockDrafter"


class NoMarkov(BaseDSparkMarkovHead):
    """Stands where SGLang calls a Markov head and the drafter has none (DFlash): tokens of a block are independent."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.register_buffer("_zero_1V", torch.zeros(1, vocab_size), persistent=False)

    def step_bias(
        self, prev_tokens: Tensor, *, hidden_states: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """No bias: one row of zeros seen by every request, because SGLang's sampling kernel wants a tensor."""
        return self._zero_1V.expand(len(prev_tokens), -1), state

    def step_logits_dtype(self, base_dtype: torch.dtype) -> torch.dtype:
        return base_dtype


class DsparkServingBlockDrafter(DSparkDraftModel):
    """SGLang's DSpark drafter with every kind of layer, without a Markov head too, and with its own vocabulary."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config=config, quant_config=quant_config, prefix=prefix)
        if not config.enable_confidence_head:
            self.confidence_head = None  # SGLang builds one whatever the config says, and would miss its weights
        self.soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._own: list[str] = []
        if getattr(config, "own_embedding", False):
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
            self._own.append("embed_tokens")
        if getattr(config, "own_head", False):
            rows = getattr(config, "draft_vocab_size", None) or config.vocab_size
            self.lm_head = ParallelLMHead(rows, config.hidden_size)
            self._own.append("lm_head")
            if rows != config.vocab_size and config.markov_rank:
                self.markov_head.markov_w2 = nn.Linear(config.markov_rank, rows, bias=False)
        self._ids_N: Tensor | None = None

    @staticmethod
    def decoder_layer_cls(*, config: Any, **kwargs: Any) -> nn.Module:
        """A draft layer of the checkpoint's kind; SGLang's constructor calls it for each layer."""
        return LAYER_KINDS[config.layer_kind](config=config, **kwargs)

    def attach_shared_modules(self, *, embed_tokens: nn.Module, lm_head: nn.Module) -> None:
        """Take the target's embedding and head, where the drafter brings none of its own."""
        embedding = self.embed_tokens if "embed_tokens" in self._own else embed_tokens
        super().attach_shared_modules(
            embed_tokens=scaled_as_trained(embedding, self.config),
            lm_head=self.lm_head if "lm_head" in self._own else lm_head,
        )

    def propose_only(self, token_ids: Tensor) -> None:
        """Propose only these ids (ascending) from now on, in logits over the whole vocabulary."""
        self._ids_N = token_ids.to(self.fc.weight.device)
        w2 = getattr(self.markov_head, "markov_w2", None)
        if w2 is not None and len(w2.weight) != self.config.vocab_size:
            rows_VR = w2.weight.new_zeros(self.config.vocab_size, w2.weight.shape[1])
            rows_VR[self._ids_N] = w2.weight.data[: len(token_ids)]
            w2.weight = nn.Parameter(rows_VR, requires_grad=False)

    def compute_base_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [T, V] of the draft rows [T, D], -inf for what may not be proposed; the rows themselves."""
        if hasattr(self.lm_head, "quant_method"):
            logits, features = super().compute_base_logits(hidden)
        else:  # Gemma's head is its embedding, whole on every rank
            weight = self.lm_head.weight[: self.config.vocab_size]
            logits, features = nn.functional.linear(hidden.to(weight.dtype), weight), hidden
        logits = soft_capped(logits, self.soft_cap)
        return (logits if self._ids_N is None else self._to_full_vocabulary(logits, self._ids_N)), features

    def _to_full_vocabulary(self, logits: Tensor, ids_N: Tensor) -> Tensor:
        rows = logits if "lm_head" in self._own else logits[..., ids_N]
        full = logits.new_full((*logits.shape[:-1], self.config.vocab_size), -math.inf)
        full[..., ids_N] = rows
        return full

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load a checkpoint of the format that config.json names; `check_weights` has seen that it is complete."""
        super().load_weights(self._not_own(canonical_weights(weights, self.config)))

    def _not_own(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """All but the weights of its own embedding and head, which are loaded here."""
        for name, tensor in weights:
            module, _, leaf = name.rpartition(".")
            if module in self._own:
                parameter = getattr(getattr(self, module), leaf)
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            else:
                yield name, tensor

    def _build_fused_kv_write_bundle(self, pool: Any) -> Any:
        """Fused writing of context keys and values knows Qwen3's layers only; None takes them layer by layer."""
        return super()._build_fused_kv_write_bundle(pool) if self.config.layer_kind == "qwen3" else None

    def _stacked_ctx_kv_params(self) -> dict[str, Any] | None:
        return super()._stacked_ctx_kv_params() if self.config.layer_kind == "qwen3" else None


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(logits / cap)`, or the logits themselves without a cap (Gemma's final logits)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
