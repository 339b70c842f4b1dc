"""The objective of block drafters (DSpark, DFlash): one drafter step, supervision in, losses out."""

from __future__ import annotations

from dspark_kernels.vocabulary_loss import DraftRows
from torch import Tensor

from dspark_training.data.blocks import Blocks
from dspark_training.data.vocab import DraftVocab
from dspark_training.models.backbone import BlockDrafter
from dspark_training.objectives.losses import Losses, Weights, dspark_losses, position_weights
from dspark_training.objectives.supervision import Supervision
from dspark_training.target import Target


class BlockObjective:
    """The DSpark objective of one drafter against one target; without heads it is DFlash's."""

    def __init__(
        self, drafter: BlockDrafter, target: Target, vocab: DraftVocab, weights: Weights, decay: float
    ) -> None:
        self.drafter = drafter
        self.vocab = vocab
        self.weights = weights
        self.decay = decay
        self._embed = target.embed
        self._soft_cap = target.final_soft_cap
        self._head_VD = target.lm_head_weight_VD[vocab.ids_V]

    def __call__(self, supervision: Supervision, blocks: Blocks) -> Losses:
        """Losses over every row; `acceptance_N` and `agrees_N` come back in [B, A, K] row order."""
        out = self.drafter(supervision.features_BTM, blocks.anchors_BA, blocks.previous_BAK, self._embed)
        position_N = supervision.positions_of(blocks).flatten()
        return dspark_losses(
            draft=self._draft_rows(out.hidden_BAKD, blocks.previous_BAK),
            target=supervision.target_rows(position_N, self._head_VD, self._soft_cap),
            target_top_N=supervision.top_BT.flatten()[position_N],
            labels_N=self.vocab.columns_T[blocks.labels_BAK.flatten()],
            confidence_N=None if out.confidence_BAK is None else out.confidence_BAK.flatten(),
            row_weights_N=position_weights(blocks.valid_BAK, self.decay).flatten(),
            weights=self.weights,
        )

    def _draft_rows(self, hidden_BAKD: Tensor, previous_BAK: Tensor) -> DraftRows:
        hidden_ND, head = hidden_BAKD.flatten(0, 2), self.drafter.markov_head
        if head is None:
            return DraftRows(hidden_ND, self._head_VD, soft_cap=self._soft_cap)
        latent_NR = head.latent(hidden_BAKD, previous_BAK).flatten(0, 2)
        w2_VR = head.markov_w2.weight[self.vocab.ids_V]
        return DraftRows(hidden_ND, self._head_VD, latent_NR, w2_VR, self._soft_cap)
