"""A new drafter for a target: dimensions, initial weights and the scale of the target's features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dspark_serving.errors import OptionError
from dspark_training.config import DrafterShape
from dspark_training.data.blocks import pad
from dspark_training.data.store import Sample
from dspark_training.models.backbone import BlockDrafter, DrafterDims
from dspark_training.target import Target


def dims_for(target: Target, shape: DrafterShape) -> DrafterDims:
    """Dimensions of a drafter that shares the target's widths.

    Raises:
        OptionError: a layer or token id that the target does not have.
    """
    c = target.config
    limit = c.num_hidden_layers - 2  # the last layer's output is only exposed after the final norm
    bad = [i for i in (*shape.target_layer_ids,) if not 0 <= i <= limit]
    if bad:
        raise OptionError(
            f"target_layer_ids {bad} do not exist in a target of {c.num_hidden_layers} layers",
            expected=f"ids from 0 to {limit}",
            fix="Correct drafter.target_layer_ids.",
        )
    if shape.mask_token_id >= c.vocab_size:
        raise OptionError(
            f"mask_token_id {shape.mask_token_id} is outside the target's vocabulary",
            expected=f"an id below {c.vocab_size}",
            fix="Choose an unused special token of the target.",
        )
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return DrafterDims(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_parameters["rope_theta"],
        num_features=len(shape.target_layer_ids),
        vocab_size=c.vocab_size,
        block_size=shape.block_size,
        mask_token_id=shape.mask_token_id,
        markov_rank=shape.markov_rank,
        markov_head_type=shape.markov_head_type,
        confidence_head=shape.confidence_head,
    )


def new_drafter(target: Target, shape: DrafterShape, seed: int) -> BlockDrafter:
    """Random weights (std 0.02, residual outputs scaled down), layers optionally started from the target's own."""
    torch.manual_seed(seed)
    drafter = BlockDrafter(dims_for(target, shape))
    for name, parameter in drafter.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data /= (2 * shape.num_layers) ** 0.5
    if drafter.markov_head is not None:
        nn.init.zeros_(drafter.markov_head.markov_w2.weight)
    if drafter.confidence_head is not None:
        nn.init.zeros_(drafter.confidence_head.proj.weight)
        nn.init.zeros_(drafter.confidence_head.proj.bias)
    for layer, source in zip(drafter.layers, shape.init_layers, strict=False):
        layer.load_state_dict(target.model.base_model.layers[source].state_dict(), strict=False)
    if shape.init_layers:
        drafter.norm.load_state_dict(target.model.base_model.norm.state_dict())
    return drafter


@torch.no_grad()
def feature_scale(target: Target, samples: Sequence[Sample], layer_ids: tuple[int, ...]) -> Tensor:
    """1 / root-mean-square of every captured dimension, [M].

    A few dimensions of a trained model are orders of magnitude above the rest and would drown them in `fc`.
    The scale is folded into `fc` when the drafter is exported.
    """
    sequences = pad(samples)
    features = target.features(sequences.ids_BT, sequences.mask_BT, layer_ids).context_BTM.float()
    rows_NM = features[sequences.mask_BT.bool()]
    return rows_NM.square().mean(0).clamp_min(1e-6).rsqrt()
