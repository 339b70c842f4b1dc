"""Parts that drafters of all families are built of; parameters named as DeepSpec names them.

Shapes: B sequences, T context rows, A anchors a sequence, K rows of an anchor, S rows that these see of their own block
or chain, D hidden size, M = D * captured layers, G key/value heads, Q query heads a key/value head, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DrafterDims:
    """Dimensions of a drafter's network; an Eagle3 drafter has one layer, no mask token and no heads."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    num_features: int  # captured target layers m
    vocab_size: int  # of the target
    block_size: int
    mask_token_id: int
    markov_rank: int
    markov_head_type: str = "vanilla"  # none, or a key of MARKOV_HEADS
    confidence_head: bool = True


Embed = Callable[[Tensor], Tensor]  # ids [...] -> rows [..., D]


class RMSNorm(nn.RMSNorm):
    """A norm in its weight's precision whatever autocast made of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Rotary:
    """Rotary position embedding, half-split layout (as Llama and Qwen3)."""

    def __init__(self, head_dim: int, theta: float) -> None:
        self._inv_freq = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [..., E] by positions [...], broadcast over x's leading dimensions."""
        angles = positions[..., None].float() * self._inv_freq.to(x.device)
        cos, sin = angles.cos(), angles.sin()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class KeysValues(NamedTuple):
    """Normed and rotated keys, and values: [B, G, T, E] of a context, [B, G, A, S, E] of blocks or chains."""

    keys: Tensor
    values: Tensor


class DraftAttention(nn.Module):
    """Rows of an anchor attend to a context that all anchors share, up to where theirs ends, and to rows of their own.

    Args:
        in_width: width of the rows that queries, keys and values are projected from.
    """

    def __init__(self, dims: DrafterDims, in_width: int) -> None:
        super().__init__()
        self.dims = dims
        q_width, kv_width = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
        self.q_proj = nn.Linear(in_width, q_width, bias=False)
        self.k_proj = nn.Linear(in_width, kv_width, bias=False)
        self.v_proj = nn.Linear(in_width, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, dims.hidden_size, bias=False)
        self.q_norm = RMSNorm(dims.head_dim, eps=dims.rms_norm_eps)
        self.k_norm = RMSNorm(dims.head_dim, eps=dims.rms_norm_eps)
        self._rotary = Rotary(dims.head_dim, dims.rope_theta)

    def context(self, rows_BTD: Tensor, first_B: Tensor) -> KeysValues:
        """Keys and values of context rows; row t of sequence b stands at position first_B[b] + t."""
        keys, values = (x.permute(0, 2, 1, 3) for x in self._kv(rows_BTD))
        positions_BT = first_B[:, None] + torch.arange(rows_BTD.shape[1], device=rows_BTD.device)
        return KeysValues(self._rotary(keys, positions_BT[:, None]), values)

    def own(self, rows_BAKD: Tensor, positions_BAK: Tensor) -> KeysValues:
        """Keys and values of the anchors' own rows."""
        keys, values = (x.permute(0, 3, 1, 2, 4) for x in self._kv(rows_BAKD))
        return KeysValues(self._rotary(keys, positions_BAK[:, None]), values)

    def attend(
        self, rows_BAKD: Tensor, positions_BAK: Tensor, context: KeysValues, own: KeysValues, ends_BA: Tensor
    ) -> Tensor:
        """Output [B, A, K, D] of rows that see the context before `ends_BA` and every row of `own`.

        Row t of `context` is taken for position t.
        """
        d = self.dims
        q = self.q_norm(self.q_proj(rows_BAKD).unflatten(-1, (d.num_kv_heads, -1, d.head_dim)))
        q_BGQAKE = self._rotary(q.permute(0, 3, 4, 1, 2, 5), positions_BAK[:, None, None])
        n_context = context.keys.shape[2]
        q_flat = q_BGQAKE.flatten(2, 4)  # one product with the shared context for all rows of a kv head
        context_scores = (q_flat @ context.keys.transpose(-1, -2)).view(*q_BGQAKE.shape[:-1], -1)
        unseen_BAT = torch.arange(n_context, device=ends_BA.device) >= ends_BA[..., None]
        context_scores = context_scores.masked_fill(unseen_BAT[:, None, None, :, None], float("-inf"))
        own_scores = q_BGQAKE @ own.keys[:, :, None].transpose(-1, -2)
        weights = torch.softmax(torch.cat([context_scores, own_scores], -1) * d.head_dim**-0.5, dim=-1)
        context_w, own_w = weights.split([n_context, own.keys.shape[3]], dim=-1)
        out_BGQAKE = own_w @ own.values[:, :, None]
        out_BGQAKE = out_BGQAKE + (context_w.flatten(2, 4) @ context.values).view_as(out_BGQAKE)
        return self.o_proj(out_BGQAKE.permute(0, 3, 4, 1, 2, 5).flatten(3))

    def _kv(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        heads = (self.dims.num_kv_heads, self.dims.head_dim)
        return self.k_norm(self.k_proj(rows).unflatten(-1, heads)), self.v_proj(rows).unflatten(-1, heads)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dims: DrafterDims) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)
        self.up_proj = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)
        self.down_proj = nn.Linear(dims.intermediate_size, dims.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rms_norm(dims: DrafterDims) -> RMSNorm:
    """A norm over the hidden size."""
    return RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
