"""The objective of block drafters (DSpark, DFlash): one drafter step, supervision in, losses out."""

from __future__ import annotations

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
        self._target = target
        self._embed = target.embed
        self._head_VD = target.lm_head_weight_VD[vocab.ids_V].float()

    def __call__(self, supervision: Supervision, blocks: Blocks) -> Losses:
        """Losses over every row; `acceptance_N` and `agrees_N` come back in [B, A, K] row order."""
        out = self.drafter(supervision.features_BTM, blocks.anchors_BA, blocks.previous_BAK, self._embed)
        rows_N = supervision.rows_of(blocks).flatten()
        return dspark_losses(
            draft_logits_NV=self._logits(out.hidden_BAKD, blocks.previous_BAK),
            target_probs_NV=supervision.probs_NV[rows_N],
            target_top_N=supervision.top_N[rows_N],
            labels_N=self.vocab.columns_T[blocks.labels_BAK.flatten()],
            confidence_N=None if out.confidence_BAK is None else out.confidence_BAK.flatten(),
            row_weights_N=position_weights(blocks.valid_BAK, self.decay).flatten(),
            weights=self.weights,
        )

    def _logits(self, hidden_BAKD: Tensor, previous_BAK: Tensor) -> Tensor:
        base_NV = self._target.soft_cap(hidden_BAKD.flatten(0, 2) @ self._head_VD.T)
        if self.drafter.markov_head is None:
            return base_NV
        latent_NR = self.drafter.markov_head.latent(hidden_BAKD, previous_BAK).flatten(0, 2)
        return base_NV + latent_NR @ self.drafter.markov_head.markov_w2.weight[self.vocab.ids_V].T
