"""Matrix products of few rows on CPU, with bf16 weights packed once instead of at every call.

oneDNN multiplies in a blocked layout and repacks a plain weight whenever it is used; for the few rows of decoding and
verification that copy is a third to a half of the product. The packed product returns the very same bits. fp32 weights
stay with MKL: exact comparisons are made in fp32, and two libraries round differently.
"""

from __future__ import annotations

from typing import Any

import torch

_ATTRIBUTE = "_dspark_packed"


class PackedWeight:
    """A packed weight [N, K]; call it with rows [..., K] to get [..., N]."""

    def __init__(self, weight_NK: torch.Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach())

    def __call__(self, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, bias, "none", [], "")


def is_packable(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a packed bf16 product for this weight on this machine."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def reset(layer: torch.nn.Module) -> None:
    """Forget the packed weight of a layer, because its weights were (re)loaded."""
    layer.__dict__.pop(_ATTRIBUTE, None)


def packed_weight(layer: Any) -> PackedWeight | None:
    """The packed weight of a layer of SGLang, made at the first use; None when its weight is used as it is."""
    if _ATTRIBUTE not in layer.__dict__:
        layer.__dict__[_ATTRIBUTE] = PackedWeight(layer.weight) if is_packable(layer.weight) else None
    found: PackedWeight | None = layer.__dict__[_ATTRIBUTE]
    return found
