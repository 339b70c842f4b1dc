"""The objective of Eagle3 drafters: training-time test (EAGLE-3, arXiv 2503.01840) at sampled anchors.

The published form runs K passes over whole sequences under a mask: pass s of row i sees the first pass's rows up to i
and its own later passes. Those K rows are the chain behind an anchor at i + 1, and chains of different anchors don't
see each other, so running the sampled ones alone gives the same rows at a cost linear in the context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_training.data.blocks import Blocks
from dspark_training.data.vocab import DraftVocab
from dspark_training.models.eagle3 import Eagle3Drafter
from dspark_training.objectives.losses import Losses
from dspark_training.objectives.supervision import Supervision
from dspark_training.target import Target

STEP_DECAY = 0.8  # weight of a step against the one before it, as EAGLE-3 and DeepSpec have it


class Eagle3Objective:
    """Soft cross-entropy to the target's distribution at every step of a teacher-forced chain."""

    def __init__(self, drafter: Eagle3Drafter, target: Target, vocab: DraftVocab) -> None:
        self.drafter = drafter
        self.vocab = vocab
        self._target = target
        self._embed = target.embed
        self._head_VD = target.lm_head_weight_VD[vocab.ids_V].float()

    def __call__(self, supervision: Supervision, blocks: Blocks) -> Losses:
        """Losses over every row; `acceptance_N` and `agrees_N` come back in [B, A, K] row order."""
        next_ids_BT = supervision.ids_BT.roll(-1, dims=1)  # the last row's is wrong, and no chain sees that row
        hidden_BAKD = self.drafter(
            supervision.features_BTM, next_ids_BT, blocks.anchors_BA, blocks.previous_BAK, self._embed
        )
        rows_N = supervision.rows_of(blocks).flatten()
        return soft_losses(
            draft_logits_NV=self._target.soft_cap(hidden_BAKD.flatten(0, 2) @ self._head_VD.T),
            target_probs_NV=supervision.probs_NV[rows_N],
            target_top_N=supervision.top_N[rows_N],
            row_weights_N=step_weights(blocks).flatten(),
        )


def step_weights(blocks: Blocks) -> Tensor:
    """Weights [B, A, K]: 0.8^k on the supervised prefix of each chain that has a row before its anchor, else 0."""
    valid_BAK = blocks.valid_BAK & (blocks.anchors_BA > 0)[..., None]
    return valid_BAK * STEP_DECAY ** torch.arange(valid_BAK.shape[-1], device=valid_BAK.device)


def soft_losses(
    draft_logits_NV: Tensor, target_probs_NV: Tensor, target_top_N: Tensor, row_weights_N: Tensor
) -> Losses:
    """The objective over rows, as a mean by weight (DeepSpec divides the same sum by the batch's positions).

    The target's distribution is renormalised over the draft vocabulary, and a row whose greedy token lies outside of it
    doesn't count (EAGLE-3's reduced vocabulary). Arguments as for `dspark_losses`; softmaxes in fp32.
    """
    log_probs_NV = torch.log_softmax(draft_logits_NV.float(), dim=-1)
    mass_N = target_probs_NV.sum(-1)
    ce_N = -(target_probs_NV * log_probs_NV).sum(-1) / mass_N.clamp_min(1e-6)
    weights_N = row_weights_N * (target_top_N >= 0)
    total = (ce_N * weights_N).sum() / weights_N.sum().clamp_min(1e-6)
    with torch.no_grad():
        l1_N = (log_probs_NV.exp() - target_probs_NV).abs().sum(-1) + (1.0 - mass_N).clamp_min(0.0)
        l1 = (l1_N * row_weights_N).sum() / row_weights_N.sum().clamp_min(1e-6)
        agrees_N = draft_logits_NV.argmax(-1) == target_top_N
    acceptance_N = (1.0 - 0.5 * l1_N).clamp(0.0, 1.0)
    return Losses(total, total.detach(), l1, l1.new_zeros(()), acceptance_N, agrees_N)
