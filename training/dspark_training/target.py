"""The frozen target: loading, a fast key/value cache, and the hidden states a drafter learns from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from dspark_serving.errors import CheckpointError

_ATTENTION = "dspark_gqa"
_SLAB_STEP = 128  # cache rows added at a time


def _gqa_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """SDPA that broadcasts key/value heads instead of copying them (the copy is 70 % of a CPU decode step)."""
    batch, heads, n_queries, width = query_BHTD.shape
    if n_queries == 1:
        # Decoding: the heads that share keys become the queries of one head, a third of the work for three of them.
        query_BGHD = query_BHTD.reshape(batch, key_BGSD.shape[1], -1, width)
        out_BGHD = F.scaled_dot_product_attention(
            query_BGHD, key_BGSD, value_BGSD, attn_mask=attention_mask, scale=scaling
        )
        return out_BGHD.reshape(batch, 1, heads, width), None
    causal = attention_mask is None
    out_BHTD = F.scaled_dot_product_attention(
        query_BHTD,
        key_BGSD,
        value_BGSD,
        attn_mask=attention_mask,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query_BHTD.shape[1] != key_BGSD.shape[1],
    )
    return out_BHTD.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _gqa_attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


class SlabLayer(DynamicLayer):
    """A dynamic cache layer that writes into a growing slab instead of concatenating at each step."""

    keys: Tensor  # [B, G, tokens so far, E], a view of the slab
    values: Tensor
    is_initialized: bool
    _slabs: tuple[Tensor, Tensor]  # keys and values, [B, G, capacity, E]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[-2] if self.is_initialized else 0
        end = start + key_states.shape[-2]
        if not self.is_initialized or end > self._slabs[0].shape[-2]:
            self._grow(key_states, start, end)
        self._slabs[0][:, :, start:end] = key_states
        self._slabs[1][:, :, start:end] = value_states
        self._show(end)
        return self.keys, self.values

    def keep_rows(self, rows: Tensor) -> None:
        """Drop every batch row that is not in `rows` [kept]."""
        length = self.keys.shape[-2]
        self._slabs = (self._slabs[0][rows], self._slabs[1][rows])
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (slab[:, :, :length] for slab in self._slabs)

    def _grow(self, like: Tensor, start: int, end: int) -> None:
        shape = (*like.shape[:2], end + _SLAB_STEP, like.shape[-1])
        slabs = (like.new_empty(shape), like.new_empty(shape))
        if start:
            slabs[0][:, :, :start], slabs[1][:, :, :start] = self.keys, self.values
        self._slabs = slabs
        self.is_initialized = True


class TargetFeatures(NamedTuple):
    """What one forward of the target gives a drafter."""

    context_BTM: Tensor  # hidden states of the m captured layers, concatenated: M = m * d
    last_BTD: Tensor  # final hidden state after the last norm: lm_head input of the next token


def device_here() -> torch.device:
    """The accelerator of this process, of several the one that torchrun's LOCAL_RANK numbers; without any, the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))


class Target:
    """A frozen causal language model with the tokenizer it was trained with."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config = model.config.get_text_config()

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype | None = None) -> Target:
        """Load a local checkpoint in safetensors format to `device_here`; without `dtype`, as it is stored.

        Raises:
            CheckpointError: `path` is no checkpoint directory.
        """
        if not (Path(path) / "config.json").is_file():
            raise CheckpointError(
                f"no target model at {path}",
                expected="a directory with config.json and safetensors weights",
                fix="Run `dspark assets smollm2`, or pass --target with a local checkpoint.",
            )
        config = AutoConfig.from_pretrained(path)
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None  # Gemma 2
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            attn_implementation="eager" if capped else _ATTENTION,
        )
        return cls(model.to(device_here()), AutoTokenizer.from_pretrained(path))

    @property
    def device(self) -> torch.device:
        """Where it runs; drafters are trained and evaluated there too."""
        return self.model.device

    @property
    def lm_head_weight_VD(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    def embed(self, ids: Tensor) -> Tensor:
        """Rows [..., D] of the embedding, scaled as the target scales them (Gemma)."""
        return self.model.get_input_embeddings()(ids)

    @property
    def embed_scale(self) -> float:
        """Factor by which the target multiplies the rows of its embedding; 1 but for Gemma."""
        return float(getattr(self.model.get_input_embeddings(), "embed_scale", 1.0))

    @property
    def final_soft_cap(self) -> float | None:
        """Bound of the logits (Gemma), None for none."""
        return getattr(self.config, "final_logit_softcapping", None)

    def soft_cap(self, logits: Tensor) -> Tensor:
        """Logits as the target caps them (Gemma's final soft cap), or as they are."""
        cap = self.final_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def decoder(self) -> Any:
        """The stack of decoder layers (`layers`) with its final norm (`norm`).

        Raises:
            CheckpointError: the model doesn't show its layers, so there is nothing for a drafter to learn from.
        """
        decoder = self.model.get_decoder()
        layers = getattr(decoder, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) == self.config.num_hidden_layers:
            return decoder
        raise CheckpointError(
            f"a {type(self.model).__name__} exposes no hidden states of its layers",
            expected="a decoder of the Llama, Qwen2, Qwen3 or Gemma kind, with its layers in `layers`",
            fix="Choose another target.",
        )

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer; empty for a target that names none."""
        stop = self.model.generation_config.eos_token_id
        return frozenset(stop if isinstance(stop, list) else [] if stop is None else [stop])

    def new_cache(self) -> Cache:
        return Cache(layers=[SlabLayer() for _ in range(self.config.num_hidden_layers)])

    def chat_ids(self, prompt: str) -> list[int]:
        """Token ids of a one-turn conversation, up to where the assistant begins."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def features(self, ids_BT: Tensor, mask_BT: Tensor, layer_ids: tuple[int, ...]) -> TargetFeatures:
        """Run the frozen target once over whole sequences.

        Args:
            ids_BT: token ids, right-padded.
            mask_BT: 1 where a token is real.
            layer_ids: decoder layers whose output is captured (layer l is HF hidden_states[l + 1]).

        Raises:
            CheckpointError: see `decoder`.
        """
        with self.capturing(layer_ids) as captured:
            out = self.decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        return TargetFeatures(torch.cat([captured[i] for i in layer_ids], dim=-1), out.last_hidden_state)

    @contextmanager
    def capturing(self, layer_ids: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
        """A dict that every forward inside fills with the outputs [B, T, D] of these decoder layers.

        Raises:
            CheckpointError: see `decoder`.
        """
        captured: dict[int, Tensor] = {}
        layers = self.decoder.layers
        hooks = [
            layers[i].register_forward_hook(lambda _m, _a, out, i=i: captured.__setitem__(i, _hidden_of(out)))
            for i in layer_ids
        ]
        try:
            yield captured
        finally:
            for hook in hooks:
                hook.remove()


def _hidden_of(layer_output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return layer_output if isinstance(layer_output, Tensor) else layer_output[0]
