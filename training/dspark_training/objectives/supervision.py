"""What the target says about every token that a drafter may have to predict."""

from __future__ import annotations

from typing import NamedTuple

import torch
from dspark_kernels.vocabulary_loss import TargetRows
from torch import Tensor

from dspark_training.data.blocks import Blocks, Sequences
from dspark_training.data.vocab import DraftVocab
from dspark_training.features.source import FeatureSource


class Supervision(NamedTuple):
    """The target's features and its next-token distributions, in factors; used by several optimizer steps."""

    ids_BT: Tensor  # of the sequences
    features_BTM: Tensor  # scaled, see Features.context_BTM
    last_BTD: Tensor  # the target's lm_head input: position t predicts token t + 1
    normaliser_BT: Tensor  # log sum exp of the target's logits; inf (no mass at all) where nothing is predicted
    top_BT: Tensor  # draft column of the target's greedy token, -1 outside; arbitrary where nothing is predicted

    def positions_of(self, blocks: Blocks) -> Tensor:
        """Positions [B, A, K] of the rows of blocks in the flattened [B * T]; arbitrary where they are not valid."""
        batch, length = self.top_BT.shape
        device = blocks.anchors_BA.device
        positions_BAK = blocks.anchors_BA[..., None] + torch.arange(blocks.labels_BAK.shape[-1], device=device)
        return torch.arange(batch, device=device)[:, None, None] * length + positions_BAK.clamp_max(length - 1)

    def target_rows(self, position_N: Tensor, head_VD: Tensor, soft_cap: float | None) -> TargetRows:
        """The target's probabilities, in factors, for rows at flattened positions [N]."""
        return TargetRows(
            self.last_BTD.flatten(0, 1), head_VD, self.normaliser_BT.flatten(), position_N, soft_cap=soft_cap
        )


@torch.no_grad()
def supervise(source: FeatureSource, sequences: Sequences, vocab: DraftVocab) -> Supervision:
    """Get what the target says about the sequences, which are where it is."""
    features = source(sequences)
    normaliser_BT = features.normaliser_BT.masked_fill(~sequences.predicting_BT, torch.inf)
    top_BT = vocab.columns_T[features.top_BT]
    return Supervision(sequences.ids_BT, features.context_BTM, features.last_BTD, normaliser_BT, top_BT)
