"""Block drafters (DFlash, DSpark) in plain torch.

Shapes: B sequences, T tokens, A anchors a sequence, K = block size (gamma), D hidden size, M = D * captured layers,
R Markov rank. Sources: DFlash (arXiv 2602.06036) for the backbone, DSpark (arXiv 2607.05147) for the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dspark_training.models.heads import MARKOV_HEADS, ConfidenceHead, MarkovHead
from dspark_training.models.layers import DraftAttention, DrafterDims, Embed, GatedMlp, KeysValues, rms_norm


class BlockOutput(NamedTuple):
    """One pass over blocks of anchors."""

    hidden_BAKD: Tensor  # after the final norm: lm_head input
    confidence_BAK: Tensor | None  # logit of "x_k survives, given that x_<k did"


class DraftLayer(nn.Module):
    """A pre-norm decoder layer whose context comes as injected keys and values (DFlash, KV injection)."""

    def __init__(self, dims: DrafterDims) -> None:
        super().__init__()
        self.self_attn = DraftAttention(dims, dims.hidden_size)
        self.mlp = GatedMlp(dims)
        self.input_layernorm = rms_norm(dims)
        self.post_attention_layernorm = rms_norm(dims)

    def forward(self, block_BAKD: Tensor, context: KeysValues, anchors_BA: Tensor) -> Tensor:
        """Blocks attend to the context before their anchor and, in both directions, to themselves."""
        rows_BAKD, attention = self.input_layernorm(block_BAKD), self.self_attn
        positions_BAK = anchors_BA[..., None] + torch.arange(block_BAKD.shape[2], device=anchors_BA.device)
        own = attention.own(rows_BAKD, positions_BAK)
        block_BAKD = block_BAKD + attention.attend(rows_BAKD, positions_BAK, context, own, anchors_BA)
        return block_BAKD + self.mlp(self.post_attention_layernorm(block_BAKD))


class BlockDrafter(nn.Module):
    """DFlash backbone, with a Markov head and a confidence head in DSpark; parameters named as DeepSpec names them."""

    def __init__(self, dims: DrafterDims) -> None:
        super().__init__()
        self.dims = dims
        self.fc = nn.Linear(dims.num_features * dims.hidden_size, dims.hidden_size, bias=False)
        self.hidden_norm = rms_norm(dims)
        self.layers = nn.ModuleList(DraftLayer(dims) for _ in range(dims.num_layers))
        self.norm = rms_norm(dims)
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
        first_B = torch.zeros(len(features_BTM), dtype=torch.long, device=features_BTM.device)
        return self.hidden_behind(self.context(features_BTM, first_B), anchors_BA, anchor_ids_BA, embed)

    def context(self, features_BTM: Tensor, first_B: Tensor) -> list[KeysValues]:
        """What each layer keeps of features, row t of sequence b at position first_B[b] + t."""
        context_BTD = self.hidden_norm(self.fc(features_BTM.to(self.fc.weight.dtype)))
        return [cast(DraftLayer, layer).self_attn.context(context_BTD, first_B) for layer in self.layers]

    def hidden_behind(
        self, context: Sequence[KeysValues], anchors_BA: Tensor, anchor_ids_BA: Tensor, embed: Embed
    ) -> Tensor:
        """`hidden` of blocks behind a context that was kept; row t of it is position t."""
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
