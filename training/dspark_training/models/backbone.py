"""Block drafters (DFlash, DSpark) in plain torch.

Shapes: B sequences, T tokens, A anchors a sequence, K = block size (gamma), D hidden size, M = D * captured layers,
G key/value heads, Q query heads a key/value head, E head width, V draft vocabulary, R Markov rank.
Sources: DFlash (arXiv 2602.06036) for the backbone, DSpark (arXiv 2607.05147) for the Markov and confidence heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark_training.models.heads import MARKOV_HEADS, ConfidenceHead, MarkovHead


@dataclass(frozen=True)
class DrafterDims:
    """Dimensions of a drafter's network."""

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


class ContextKV(NamedTuple):
    """What a layer keeps of the context: entry t is position t."""

    k_BGTE: Tensor  # rotated
    v_BGTE: Tensor


class BlockOutput(NamedTuple):
    """One pass over blocks of anchors."""

    hidden_BAKD: Tensor  # after the final norm: lm_head input
    confidence_BAK: Tensor | None  # logit of "x_k survives, given that x_<k did"


class Rotary:
    """Rotary position embedding, half-split layout (as Llama and Qwen3)."""

    def __init__(self, head_dim: int, theta: float) -> None:
        self._inv_freq = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [..., E] by positions [...], broadcast over x's leading dimensions."""
        angles = positions[..., None].float() * self._inv_freq
        cos, sin = angles.cos(), angles.sin()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class BlockAttention(nn.Module):
    """Blocks attend to the context before their anchor and, in both directions, to themselves."""

    def __init__(self, dims: DrafterDims) -> None:
        super().__init__()
        self.dims = dims
        q_width, kv_width = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
        self.q_proj = nn.Linear(dims.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(dims.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(dims.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, dims.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(dims.head_dim, eps=dims.rms_norm_eps)
        self.k_norm = nn.RMSNorm(dims.head_dim, eps=dims.rms_norm_eps)
        self._rotary = Rotary(dims.head_dim, dims.rope_theta)

    def context_kv(self, context_BTD: Tensor, first_B: Tensor) -> ContextKV:
        """Keys and values of context tokens; token t of row b stands at position first_B[b] + t."""
        k_BGTE, v_BGTE = (x.permute(0, 2, 1, 3) for x in self._kv(context_BTD))
        positions_BT = first_B[:, None] + torch.arange(context_BTD.shape[1])
        return ContextKV(self._rotary(k_BGTE, positions_BT[:, None]), v_BGTE)

    def forward(self, block_BAKD: Tensor, context: ContextKV, anchors_BA: Tensor) -> Tensor:
        d = self.dims
        k_BGTE, v_BGTE = context
        n_context = k_BGTE.shape[2]
        batch, n_anchors, n_block, _ = block_BAKD.shape
        positions_BAK = anchors_BA[..., None] + torch.arange(n_block)
        q = self.q_norm(self.q_proj(block_BAKD).unflatten(-1, (d.num_kv_heads, -1, d.head_dim)))
        q_BGQAKE = self._rotary(q.permute(0, 3, 4, 1, 2, 5), positions_BAK[:, None, None])
        k_BGAKE, v_BGAKE = (x.permute(0, 3, 1, 2, 4) for x in self._kv(block_BAKD))
        k_BGAKE = self._rotary(k_BGAKE, positions_BAK[:, None])

        q_flat = q_BGQAKE.flatten(2, 4)  # one product with the shared context for all rows of a kv head
        context_scores = (q_flat @ k_BGTE.transpose(-1, -2)).view(*q_BGQAKE.shape[:-1], -1)
        unseen_BAT = torch.arange(n_context) >= anchors_BA[..., None]
        context_scores = context_scores.masked_fill(unseen_BAT[:, None, None, :, None], float("-inf"))
        block_scores = q_BGQAKE @ k_BGAKE[:, :, None].transpose(-1, -2)
        weights = torch.softmax(torch.cat([context_scores, block_scores], -1) * d.head_dim**-0.5, dim=-1)
        context_w, block_w = weights.split([n_context, n_block], dim=-1)
        out_BGQAKE = block_w @ v_BGAKE[:, :, None]
        out_BGQAKE = out_BGQAKE + (context_w.flatten(2, 4) @ v_BGTE).view_as(out_BGQAKE)
        return self.o_proj(out_BGQAKE.permute(0, 3, 4, 1, 2, 5).reshape(batch, n_anchors, n_block, -1))

    def _kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = (self.dims.num_kv_heads, self.dims.head_dim)
        return self.k_norm(self.k_proj(x).unflatten(-1, heads)), self.v_proj(x).unflatten(-1, heads)


class GatedMlp(nn.Module):
    def __init__(self, dims: DrafterDims) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)
        self.up_proj = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)
        self.down_proj = nn.Linear(dims.intermediate_size, dims.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """A pre-norm decoder layer whose context comes as injected keys and values (DFlash, KV injection)."""

    def __init__(self, dims: DrafterDims) -> None:
        super().__init__()
        self.self_attn = BlockAttention(dims)
        self.mlp = GatedMlp(dims)
        self.input_layernorm = nn.RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)

    def forward(self, block_BAKD: Tensor, context: ContextKV, anchors_BA: Tensor) -> Tensor:
        block_BAKD = block_BAKD + self.self_attn(self.input_layernorm(block_BAKD), context, anchors_BA)
        return block_BAKD + self.mlp(self.post_attention_layernorm(block_BAKD))


class BlockDrafter(nn.Module):
    """DFlash backbone, with a Markov head and a confidence head in DSpark; parameters named as DeepSpec names them."""

    def __init__(self, dims: DrafterDims) -> None:
        super().__init__()
        self.dims = dims
        self.fc = nn.Linear(dims.num_features * dims.hidden_size, dims.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(dims) for _ in range(dims.num_layers))
        self.norm = nn.RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.markov_head: MarkovHead | None = None
        if dims.markov_head_type != "none":
            head = MARKOV_HEADS[dims.markov_head_type]
            self.markov_head = head(dims.vocab_size, dims.markov_rank, dims.hidden_size)
        self.confidence_head: ConfidenceHead | None = None
        if dims.confidence_head:
            self.confidence_head = ConfidenceHead(dims.hidden_size, dims.markov_rank if self.markov_head else 0)

    def forward(self, features_BTM: Tensor, anchors_BA: Tensor, previous_BAK: Tensor, embed: Embed) -> BlockOutput:
        """Run blocks in parallel, the confidence teacher-forced on `previous_BAK`.

        Args:
            features_BTM: captured target features; only positions before an anchor are looked at.
            anchors_BA: position p of each anchor in its sequence.
            previous_BAK: ids of x_0 (the anchor) .. x_{K-1}; row k is the token before the one that row k predicts.
            embed: the target's frozen embedding.
        """
        hidden_BAKD = self.hidden(features_BTM, anchors_BA, previous_BAK[..., 0], embed)
        if self.confidence_head is None:
            return BlockOutput(hidden_BAKD, None)
        return BlockOutput(hidden_BAKD, self.confidence(hidden_BAKD, previous_BAK))

    def hidden(self, features_BTM: Tensor, anchors_BA: Tensor, anchor_ids_BA: Tensor, embed: Embed) -> Tensor:
        """The backbone alone: [B, A, K, D] after the final norm. It knows no drafted token."""
        first_B = torch.zeros(len(features_BTM), dtype=torch.long)
        return self.hidden_behind(self.context(features_BTM, first_B), anchors_BA, anchor_ids_BA, embed)

    def context(self, features_BTM: Tensor, first_B: Tensor) -> list[ContextKV]:
        """What each layer keeps of the features at positions first_B[b], first_B[b] + 1, ... of row b."""
        context_BTD = self.hidden_norm(self.fc(features_BTM))
        return [layer.self_attn.context_kv(context_BTD, first_B) for layer in self.layers]

    def hidden_behind(
        self, context: Sequence[ContextKV], anchors_BA: Tensor, anchor_ids_BA: Tensor, embed: Embed
    ) -> Tensor:
        """`hidden` of blocks behind a context that was kept; entry t of it is position t."""
        ids_BAK = anchor_ids_BA[..., None].repeat(1, 1, self.dims.block_size)
        ids_BAK[..., 1:] = self.dims.mask_token_id
        block_BAKD = embed(ids_BAK).to(self.norm.weight.dtype)
        for layer, kept in zip(self.layers, context, strict=True):
            block_BAKD = layer(block_BAKD, kept, anchors_BA)
        return self.norm(block_BAKD)

    def confidence(self, hidden_BAKD: Tensor, previous_BAK: Tensor) -> Tensor:
        """Confidence logits [B, A, K]; row k sees x_{k-1} and never x_k itself.

        Raises:
            ValueError: the drafter has no confidence head.
        """
        if self.confidence_head is None:
            raise ValueError("this drafter has no confidence head")
        latent_BAKR = self.markov_head.markov_w1(previous_BAK) if self.markov_head else None
        return self.confidence_head(hidden_BAKD, latent_BAKR)
