"""Codecs of cached features: rows of floats to bytes and back.

Every group of values shares one fp16 scale. Integers are mid-rise: 2^bits levels, none of them wasted on a second zero,
so a value is off by at most absmax / 2^bits of its group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CodecName = Literal["int8", "fp8", "int4", "int3"]

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_SCALE_RANGE = (2.0**-14, 65504.0)  # normal numbers of fp16: below, a scale itself would lose bits


@dataclass(frozen=True)
class Quantiser:
    """How rows [N, W] become fp16 scales [N, groups] and bytes [N, code_bytes]."""

    bits: int  # that divide into whole bytes: 8, 4 or 3 (eight values in three bytes)
    group: int | None  # values that share a scale; None: the hidden size (one token of one captured layer)
    floating: bool = False  # fp8 e4m3 instead of integers

    def groups(self, width: int, hidden_size: int) -> int:
        return math.ceil(width / (self.group or hidden_size))

    def code_bytes(self, width: int, hidden_size: int) -> int:
        return math.ceil(self.groups(width, hidden_size) * (self.group or hidden_size) * self.bits / 8)

    def row_bytes(self, width: int, hidden_size: int) -> int:
        """Bytes of one row of `width` values, scales included."""
        return self.code_bytes(width, hidden_size) + 2 * self.groups(width, hidden_size)

    def encode(self, rows_NW: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
        group = self.group or hidden_size
        padded_NW = F.pad(rows_NW.float(), (0, -rows_NW.shape[1] % group))
        grouped_NGg = padded_NW.unflatten(1, (-1, group))
        half = _FP8_MAX if self.floating else 2.0 ** (self.bits - 1)
        scales_NG = (grouped_NGg.abs().amax(-1) / half).clamp(*_SCALE_RANGE).half()
        scaled_NGg = grouped_NGg / scales_NG.float()[..., None]
        if self.floating:
            codes_NW = scaled_NGg.clamp(-half, half).to(_FP8).view(torch.uint8).flatten(1)
            return scales_NG, codes_NW
        unsigned_NW = (scaled_NGg.floor().clamp(-half, half - 1) + half).to(torch.int32).flatten(1)
        return scales_NG, _pack(unsigned_NW, self.bits)

    def decode(self, scales_NG: Tensor, codes_NC: Tensor, width: int) -> Tensor:
        if self.floating:
            values_NW = codes_NC.view(_FP8).float()
        else:
            values_NW = _unpack(codes_NC, self.bits).float() - (2.0 ** (self.bits - 1) - 0.5)
        groups = scales_NG.shape[1]
        values_NW = (values_NW.unflatten(1, (groups, -1)) * scales_NG.float()[..., None]).flatten(1)
        return values_NW[:, :width]


class Codec(NamedTuple):
    """Quantisers of the context features and of the last hidden state (the target's distributions hang on that one)."""

    context: Quantiser
    last: Quantiser

    def bytes_per_token(self, layers: int, hidden_size: int, predicting_share: float = 1.0) -> float:
        """Bytes of one token in the cache, without the 32 bytes a record.

        Args:
            layers: captured layers m.
            predicting_share: share of tokens that predict a supervised one; only they keep a last hidden state,
                the normaliser and the greedy token.
        """
        context = self.context.row_bytes(layers * hidden_size, hidden_size)
        return context + predicting_share * (self.last.row_bytes(hidden_size, hidden_size) + 8)


def deepspec_bytes_per_token(layers: int, hidden_size: int) -> int:
    """What DeepSpec's cache takes: bf16 features of m layers and the last one, ids and masks."""
    return (layers + 1) * hidden_size * 2 + 6


# A few dimensions of the last hidden state are far above the rest: with one scale a token they would cost it precision.
_LAST = Quantiser(8, 32)
CODECS: dict[CodecName, Codec] = {
    "int8": Codec(Quantiser(8, None), _LAST),
    "fp8": Codec(Quantiser(8, None, floating=True), Quantiser(8, None, floating=True)),
    "int4": Codec(Quantiser(4, 32), _LAST),
    "int3": Codec(Quantiser(3, 64), _LAST),
}


def _pack(values_NW: Tensor, bits: int) -> Tensor:
    """Unsigned int32 values below 2^bits to bytes, lowest bits first."""
    together = math.lcm(bits, 8)
    words_NX = _combine(F.pad(values_NW, (0, -values_NW.shape[1] % (together // bits))), together // bits, bits)
    return _split(words_NX, together // 8, 8).to(torch.uint8)


def _unpack(bytes_NC: Tensor, bits: int) -> Tensor:
    together = math.lcm(bits, 8)
    return _split(_combine(bytes_NC.to(torch.int32), together // 8, 8), together // bits, bits)


def _combine(parts_NW: Tensor, count: int, bits: int) -> Tensor:
    parts_NXc = parts_NW.unflatten(1, (-1, count))
    words_NX = parts_NXc[..., 0]
    for i in range(1, count):
        words_NX = words_NX | (parts_NXc[..., i] << (bits * i))
    return words_NX


def _split(words_NX: Tensor, count: int, bits: int) -> Tensor:
    shifts_c = torch.arange(count, dtype=torch.int32) * bits
    return ((words_NX[..., None] >> shifts_c) & (2**bits - 1)).flatten(1)
