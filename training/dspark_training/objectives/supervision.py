"""What the target says about every token that a drafter may have to predict."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dspark_training.data.blocks import Blocks, Sequences
from dspark_training.data.vocab import DraftVocab
from dspark_training.features.source import FeatureSource
from dspark_training.target import Target


class Supervision(NamedTuple):
    """The target's features and its next-token distributions; computed once, used by several optimizer steps."""

    features_BTM: Tensor  # scaled, see Features.context_BTM
    probs_NV: Tensor  # target probabilities of the draft vocabulary, a row for each predicting position
    top_N: Tensor  # draft column of the target's greedy token, -1 outside
    ids_BT: Tensor  # of the sequences
    rows_BT: Tensor  # row of position t (whose hidden state predicts token t + 1), 0 where unused

    def rows_of(self, blocks: Blocks) -> Tensor:
        """Rows [B, A, K] of `probs_NV` and `top_N` behind the rows of blocks; arbitrary where they are not valid."""
        positions_BAK = blocks.anchors_BA[..., None] + torch.arange(blocks.labels_BAK.shape[-1])
        batch_B11 = torch.arange(len(positions_BAK))[:, None, None]
        return self.rows_BT[batch_B11, positions_BAK.clamp_max(self.rows_BT.shape[1] - 1)]


@torch.no_grad()
def supervise(source: FeatureSource, target: Target, sequences: Sequences, vocab: DraftVocab) -> Supervision:
    """Get the features of the sequences and run the target's head over their supervised positions."""
    features = source(sequences)
    wanted_BT = sequences.predicting_BT
    rows_BT = (wanted_BT.flatten().cumsum(0) - 1).clamp_min(0).view_as(wanted_BT)
    head_VD = target.lm_head_weight_VD[vocab.ids_V]
    logits_NV = target.soft_cap(features.last_BTD[wanted_BT].to(head_VD.dtype) @ head_VD.T).float()
    probs_NV = (logits_NV - features.normaliser_BT[wanted_BT][:, None]).exp_()
    top_N = vocab.columns_T[features.top_BT[wanted_BT]]
    return Supervision(features.context_BTM, probs_NV, top_N, sequences.ids_BT, rows_BT)
