"""The Eagle3 drafter in plain torch: a chain of rows, each fed with the output of the one before it.

Row i takes a hidden state h_i and token i + 1, stands at RoPE position i and predicts token i + 2. h_i is fc(target
features of position i) where the target has been, and the layer's own output, before the final norm, in a drafted row.
The chain behind an anchor at position p begins with row p - 1: the last one with features, paired with the anchor.

Shapes: B sequences, T context rows, A anchors a sequence, K steps (gamma), S steps so far, D hidden size, M = D *
captured layers. Sources: EAGLE-3 (arXiv 2503.01840); DeepSpec's Qwen3Eagle3Model for parameter names and norms.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dspark_training.models.layers import DraftAttention, DrafterDims, Embed, GatedMlp, KeysValues, rms_norm


class Context(NamedTuple):
    """What committed tokens leave behind, for every chain of their sequence."""

    hidden_BTD: Tensor  # fc of the target's features
    rows: KeysValues


class Chain(NamedTuple):
    """Chains in the middle of drafting, all of them after the same number of steps."""

    starts_BA: Tensor  # row of the first step: the anchor's position - 1
    hidden_BAD: Tensor  # h of the next step
    rows: KeysValues | None  # of the steps so far, [B, G, A, S, E]; None before the first


class ChainLayer(nn.Module):
    """A pre-norm decoder layer whose attention takes a token's embedding and h side by side."""

    def __init__(self, dims: DrafterDims) -> None:
        super().__init__()
        self.self_attn = DraftAttention(dims, 2 * dims.hidden_size)
        self.mlp = GatedMlp(dims)
        self.input_layernorm = rms_norm(dims)  # of the embedding
        self.hidden_norm = rms_norm(dims)  # of h
        self.post_attention_layernorm = rms_norm(dims)

    def wide(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """Inputs of the attention, [..., 2 D]."""
        return torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)

    def after_attention(self, attended: Tensor, hidden: Tensor) -> Tensor:
        stream = hidden + attended
        return stream + self.mlp(self.post_attention_layernorm(stream))


class Eagle3Drafter(nn.Module):
    """Eagle3's chain drafter. The target's frozen embedding and output head are shared, so they are no part of it."""

    def __init__(self, dims: DrafterDims) -> None:
        super().__init__()
        self.dims = dims
        self.fc = nn.Linear(dims.num_features * dims.hidden_size, dims.hidden_size, bias=False)
        self.layers = nn.ModuleList([ChainLayer(dims)])
        self.norm = rms_norm(dims)

    def forward(
        self, features_BTM: Tensor, next_ids_BT: Tensor, anchors_BA: Tensor, previous_BAK: Tensor, embed: Embed
    ) -> Tensor:
        """Run every chain teacher-forced: [B, A, K, D] after the final norm, row k predicts x_{k+1}.

        Args:
            features_BTM: captured target features; only positions before an anchor are looked at.
            next_ids_BT: id of the token after each of these positions.
            anchors_BA: position p of each anchor in its sequence, at least 1.
            previous_BAK: ids of x_0 (the anchor) .. x_{K-1}.
            embed: the target's frozen embedding.
        """
        first_B = torch.zeros(len(features_BTM), dtype=torch.long, device=features_BTM.device)
        context = self.context(features_BTM, next_ids_BT, first_B, embed)
        chain = self.begin(context, anchors_BA)
        steps = []
        for ids_BA in previous_BAK.unbind(-1):
            hidden_BAD, chain = self.step(context.rows, chain, ids_BA, embed)
            steps.append(hidden_BAD)
        return torch.stack(steps, dim=2)

    def context(self, features_BTM: Tensor, next_ids_BT: Tensor, first_B: Tensor, embed: Embed) -> Context:
        """What committed rows leave, row t of sequence b at position first_B[b] + t.

        It depends on its own row only, because there is one layer.
        """
        hidden_BTD = self.fc(features_BTM.to(self.fc.weight.dtype)).to(
            self.norm.weight.dtype
        )  # the residual keeps its precision
        wide = self._layer.wide(embed(next_ids_BT).to(hidden_BTD.dtype), hidden_BTD)
        return Context(hidden_BTD, self._layer.self_attn.context(wide, first_B))

    def begin(self, context: Context, anchors_BA: Tensor) -> Chain:
        """Chains that have not drafted yet."""
        starts_BA = anchors_BA - 1
        batch_B1 = torch.arange(len(anchors_BA), device=anchors_BA.device)[:, None]
        return Chain(starts_BA, context.hidden_BTD[batch_B1, starts_BA.clamp_min(0)], None)

    def step(self, context: KeysValues, chain: Chain, ids_BA: Tensor, embed: Embed) -> tuple[Tensor, Chain]:
        """One step behind the tokens `ids_BA`: lm_head's input [B, A, D] for the tokens after them, and the chain.

        Args:
            context: rows of the context, row t at position t; those from a chain's start on are not looked at.
        """
        layer = self._layer
        hidden_BA1D, embeds = chain.hidden_BAD[:, :, None], embed(ids_BA[..., None])
        wide = layer.wide(embeds.to(hidden_BA1D.dtype), hidden_BA1D)
        done = 0 if chain.rows is None else chain.rows.keys.shape[3]
        positions_BA1 = chain.starts_BA[..., None] + done
        rows = layer.self_attn.own(wide, positions_BA1)
        if chain.rows is not None:
            rows = KeysValues(*(torch.cat(pair, dim=3) for pair in zip(chain.rows, rows, strict=True)))
        attended = layer.self_attn.attend(wide, positions_BA1, context, rows, chain.starts_BA)
        output_BAD = layer.after_attention(attended, hidden_BA1D)[:, :, 0]
        return self.norm(output_BAD), Chain(chain.starts_BA, output_BAD, rows)

    @property
    def _layer(self) -> ChainLayer:
        return cast(ChainLayer, self.layers[0])
