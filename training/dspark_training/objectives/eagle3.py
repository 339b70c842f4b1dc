"""The objective of Eagle3 drafters: training-time test (EAGLE-3, arXiv 2503.01840) at sampled anchors.

The published form runs K passes over whole sequences under a mask: pass s of row i sees the first pass's rows up to i
and its own later passes. Those K rows are the chain behind an anchor at i + 1, and chains of different anchors don't
see each other, so running the sampled ones alone gives the same rows at a cost linear in the context.
"""

from __future__ import annotations

import torch
from dspark_kernels.vocabulary_loss import DraftRows, RowWeights, TargetRows, vocabulary_loss
from torch import Tensor

from dspark_training.data.blocks import Blocks
from dspark_training.data.vocab import DraftVocab
from dspark_training.models.eagle3 import Eagle3Drafter
from dspark_training.objectives.losses import Losses, shares_of
from dspark_training.objectives.supervision import Supervision
from dspark_training.target import Target

STEP_DECAY = 0.8  # weight of a step against the one before it, as EAGLE-3 and DeepSpec have it


class Eagle3Objective:
    """Soft cross-entropy to the target's distribution at every step of a teacher-forced chain."""

    def __init__(self, drafter: Eagle3Drafter, target: Target, vocab: DraftVocab) -> None:
        self.drafter = drafter
        self.vocab = vocab
        self._embed = target.embed
        self._soft_cap = target.final_soft_cap
        self._head_VD = target.lm_head_weight_VD[vocab.ids_V]

    def __call__(self, supervision: Supervision, blocks: Blocks) -> Losses:
        """Losses over every row; `acceptance_N` and `agrees_N` come back in [B, A, K] row order."""
        next_ids_BT = supervision.ids_BT.roll(-1, dims=1)  # the last row's is wrong, and no chain sees that row
        hidden_BAKD = self.drafter(
            supervision.features_BTM, next_ids_BT, blocks.anchors_BA, blocks.previous_BAK, self._embed
        )
        position_N = supervision.positions_of(blocks).flatten()
        return soft_losses(
            draft=DraftRows(hidden_BAKD.flatten(0, 2), self._head_VD, soft_cap=self._soft_cap),
            target=supervision.target_rows(position_N, self._head_VD, self._soft_cap),
            target_top_N=supervision.top_BT.flatten()[position_N],
            row_weights_N=step_weights(blocks).flatten(),
        )


def step_weights(blocks: Blocks) -> Tensor:
    """Weights [B, A, K]: 0.8^k on the supervised prefix of each chain that has a row before its anchor, else 0."""
    valid_BAK = blocks.valid_BAK & (blocks.anchors_BA > 0)[..., None]
    return valid_BAK * STEP_DECAY ** torch.arange(valid_BAK.shape[-1], device=valid_BAK.device)


def soft_losses(draft: DraftRows, target: TargetRows, target_top_N: Tensor, row_weights_N: Tensor) -> Losses:
    """The objective over rows, as a mean by weight (DeepSpec divides the same sum by the batch's positions).

    With a reduced draft vocabulary a row whose greedy token lies outside doesn't count, as in EAGLE-3. Where that
    renormalises the target's distribution, a row here weighs as much as the mass that it has inside.
    Arguments as for `dspark_losses`.
    """
    shares_N = shares_of(row_weights_N * (target_top_N >= 0))
    no_labels_N = torch.full_like(target_top_N, -1)
    total, rows = vocabulary_loss(draft, target, no_labels_N, RowWeights(soft_ce_N=shares_N))
    l1 = (rows.l1_N * shares_of(row_weights_N)).sum()
    acceptance_N = (1.0 - 0.5 * rows.l1_N).clamp(0.0, 1.0)
    return Losses(total, total.detach(), l1, l1.new_zeros(()), acceptance_N, rows.top_N == target_top_N)
