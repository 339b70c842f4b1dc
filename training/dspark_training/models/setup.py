"""A new drafter for a target: dimensions, initial weights and the scale of the target's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dspark_serving.drafters.spec import Family
from dspark_serving.errors import CheckpointError, OptionError
from dspark_training.config import DrafterShape
from dspark_training.data.blocks import pad
from dspark_training.data.store import Sample
from dspark_training.models.backbone import BlockDrafter
from dspark_training.models.eagle3 import Eagle3Drafter
from dspark_training.models.layers import DrafterDims
from dspark_training.target import Target

Drafter = BlockDrafter | Eagle3Drafter

# What an algorithm leaves no choice of.
_FIXED: dict[Family, dict[str, Any]] = {
    "dspark": {},
    "dflash": {"markov_head_type": "none", "confidence_head": False},
    "eagle3": {"markov_head_type": "none", "confidence_head": False, "num_layers": 1},
}


def dims_for(target: Target, shape: DrafterShape, algorithm: Family) -> DrafterDims:
    """Dimensions of a drafter that shares the target's widths; what the algorithm fixes overrides `shape`.

    Raises:
        OptionError: a layer or token id that the target does not have, or feature layers in another order.
        CheckpointError: the target shows no layers, or its config.json lacks a width.
    """
    c, shape = target.config, shape.model_copy(update=_FIXED[algorithm])
    check_context_layers(target, "drafter.target_layer_ids", shape.target_layer_ids)
    _check_layers(target, "drafter.init_layers", shape.init_layers, len(target.decoder.layers) - 1)
    if shape.mask_token_id >= c.vocab_size:
        raise OptionError(
            f"mask_token_id {shape.mask_token_id} is outside the target's vocabulary",
            expected=f"an id below {c.vocab_size}",
            fix="Choose an unused special token of the target.",
        )
    heads = _width(target, "num_attention_heads")
    return DrafterDims(
        hidden_size=_width(target, "hidden_size"),
        intermediate_size=_width(target, "intermediate_size"),
        num_layers=shape.num_layers,
        num_heads=heads,
        num_kv_heads=getattr(c, "num_key_value_heads", None) or heads,
        head_dim=getattr(c, "head_dim", None) or c.hidden_size // heads,
        rms_norm_eps=getattr(c, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(target),
        num_features=len(shape.target_layer_ids),
        vocab_size=c.vocab_size,
        block_size=shape.block_size,
        mask_token_id=shape.mask_token_id,
        markov_rank=shape.markov_rank,
        markov_head_type=shape.markov_head_type,
        confidence_head=shape.confidence_head,
    )


def check_context_layers(target: Target, field: str, ids: Sequence[int]) -> None:
    """Raise OptionError unless `ids` are layers, ascending as serving requires, whose output the target shows."""
    # The last layer's output is only exposed after the final norm.
    last = len(target.decoder.layers) - 2
    _check_layers(target, field, ids, last)
    if not ids or list(ids) != sorted(set(ids)):
        raise OptionError(
            f"{field} is {list(ids)}",
            expected=f"at least one id from 0 to {last}, in ascending order, each once",
            fix=f"Correct {field}.",
        )


def _check_layers(target: Target, field: str, ids: Sequence[int], last: int) -> None:
    bad = [i for i in ids if not 0 <= i <= last]
    if bad:
        raise OptionError(
            f"{field} {bad} do not exist in a target of {target.config.num_hidden_layers} layers",
            expected=f"ids from 0 to {last}",
            fix=f"Correct {field}.",
        )


def _width(target: Target, name: str) -> int:
    found = getattr(target.config, name, None)
    if isinstance(found, int):
        return found
    raise CheckpointError(
        f"the target's config.json has {name} {found!r}",
        expected="one width for all layers",
        fix="Choose a target of the Llama, Qwen2, Qwen3 or Gemma kind.",
    )


def _rope_theta(target: Target) -> float:
    """Base of the target's rotary embedding; of its full-attention layers where kinds of layers differ (Gemma)."""
    rope = getattr(target.config, "rope_parameters", None) or {}
    return float(rope.get("full_attention", rope).get("rope_theta", 10000.0))


def new_drafter(target: Target, shape: DrafterShape, algorithm: Family, seed: int) -> Drafter:
    """Random weights (std 0.02, residual outputs scaled down), layers optionally started from the target's own.

    They are drawn on the CPU, the same whatever the device, and lie where the target is.

    Raises:
        OptionError, CheckpointError: see `dims_for`.
    """
    torch.manual_seed(seed)
    dims = dims_for(target, shape, algorithm)
    drafter: Drafter = Eagle3Drafter(dims) if algorithm == "eagle3" else BlockDrafter(dims)
    for name, parameter in drafter.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data /= (2 * dims.num_layers) ** 0.5
    if isinstance(drafter, BlockDrafter) and drafter.markov_head is not None:
        nn.init.zeros_(drafter.markov_head.markov_w2.weight)
    if isinstance(drafter, BlockDrafter) and drafter.confidence_head is not None:
        nn.init.zeros_(drafter.confidence_head.proj.weight)
        nn.init.zeros_(drafter.confidence_head.proj.bias)
    for layer, source in zip(drafter.layers, shape.init_layers, strict=False):
        _start_from(layer, target.decoder.layers[source])
    if shape.init_layers:
        _start_from(drafter.norm, target.decoder.norm)
    return drafter.to(target.device)


@torch.no_grad()
def _start_from(module: nn.Module, source: nn.Module) -> None:
    """Copy every parameter that both have in one shape; a norm's by what it does, because Gemma stores w - 1."""
    sources = dict(source.named_modules())
    if "pre_feedforward_layernorm" in sources:  # Gemma's name for the norm before the MLP
        sources["post_attention_layernorm"] = sources["pre_feedforward_layernorm"]
    for name, part in module.named_modules():
        other = sources.get(name)
        if other is None or getattr(other, "weight", None) is None or getattr(part, "weight", None) is None:
            continue
        weight = other(torch.ones_like(other.weight)) if isinstance(part, nn.RMSNorm) else other.weight
        if weight.shape == part.weight.shape:
            part.weight.copy_(weight)


@torch.no_grad()
def feature_scale(target: Target, samples: Sequence[Sample], layer_ids: tuple[int, ...]) -> Tensor:
    """1 / root-mean-square of every captured dimension, [M].

    A few dimensions of a trained model are orders of magnitude above the rest and would drown them in `fc`.
    The scale is folded into `fc` when the drafter is exported.
    """
    sequences = pad(samples).to(target.device)
    features = target.features(sequences.ids_BT, sequences.mask_BT, layer_ids).context_BTM.float()
    rows_NM = features[sequences.mask_BT.bool()]
    return rows_NM.square().mean(0).clamp_min(1e-6).rsqrt()
