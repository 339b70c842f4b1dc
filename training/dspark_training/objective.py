"""One drafter step: target features in, losses out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dspark_training.blocks import Blocks, Sequences
from dspark_training.losses import Losses, Weights, dspark_losses, position_weights
from dspark_training.model import DSparkDrafter
from dspark_training.target import Target
from dspark_training.vocab import DraftVocab

_HEAD_ROWS = 256  # rows of full-vocabulary target logits held at once


class Supervision(NamedTuple):
    """What the target says about padded sequences; computed once, used by several optimizer steps."""

    features_BTM: Tensor  # captured hidden states, scaled
    probs_NV: Tensor  # target probabilities of the draft vocabulary for each answer position
    top_N: Tensor  # draft column of the target's greedy token, -1 outside
    rows_BT: Tensor  # row of position t (whose hidden state predicts token t + 1), 0 where unused


@torch.no_grad()
def supervise(
    target: Target, sequences: Sequences, layer_ids: tuple[int, ...], scale_M: Tensor | None, vocab: DraftVocab
) -> Supervision:
    """Run the frozen target over the sequences and its head over their answers."""
    features = target.features(sequences.ids_BT, sequences.mask_BT, layer_ids)
    positions = torch.arange(sequences.ids_BT.shape[1])
    starts_B, ends_B = torch.tensor(sequences.answer_starts), torch.tensor(sequences.ends)
    wanted_BT = (positions >= starts_B[:, None]) & (positions < ends_B[:, None] - 1)
    rows_BT = (wanted_BT.flatten().cumsum(0) - 1).clamp_min(0).view_as(wanted_BT)
    hidden_ND = features.last_BTD[wanted_BT]
    weight_VD = target.lm_head_weight_VD
    probs, tops = [], []
    for chunk_ND in hidden_ND.split(_HEAD_ROWS):
        logits_NT = (chunk_ND.to(weight_VD.dtype) @ weight_VD.T).float()
        tops.append(vocab.columns_T[logits_NT.argmax(-1)])
        probs.append((logits_NT[:, vocab.ids_V] - logits_NT.logsumexp(-1, keepdim=True)).exp_())
    context_BTM = features.context_BTM.float()
    if scale_M is not None:
        context_BTM = context_BTM * scale_M
    return Supervision(context_BTM, torch.cat(probs), torch.cat(tops), rows_BT)


class DraftObjective:
    """The DSpark objective of one drafter against one target."""

    def __init__(
        self, drafter: DSparkDrafter, target: Target, vocab: DraftVocab, weights: Weights, decay: float
    ) -> None:
        self.drafter = drafter
        self.vocab = vocab
        self.weights = weights
        self.decay = decay
        self._embedding_VD = target.embedding_weight_VD.float()
        self._head_VD = target.lm_head_weight_VD[vocab.ids_V].float()

    def __call__(self, supervision: Supervision, blocks: Blocks) -> Losses:
        """Losses over every row; `acceptance_N` and `agrees_N` come back in [B, A, K] row order."""
        out = self.drafter(supervision.features_BTM, blocks.anchors_BA, blocks.previous_BAK, self._embedding_VD)
        hidden_ND = out.hidden_BAKD.flatten(0, 2)
        w2_RV = self.drafter.markov_head.markov_w2.weight[self.vocab.ids_V].T
        bias_NV = self.drafter.markov_bias(blocks.previous_BAK.flatten(), w2_RV)
        positions_BAK = blocks.anchors_BA[..., None] + torch.arange(blocks.labels_BAK.shape[-1])
        limit = supervision.rows_BT.shape[1] - 1
        batch_B11 = torch.arange(len(positions_BAK))[:, None, None]
        rows_N = supervision.rows_BT[batch_B11, positions_BAK.clamp_max(limit)].flatten()
        return dspark_losses(
            draft_logits_NV=torch.addmm(bias_NV, hidden_ND, self._head_VD.T),
            target_probs_NV=supervision.probs_NV[rows_N],
            target_top_N=supervision.top_N[rows_N],
            labels_N=self.vocab.columns_T[blocks.labels_BAK.flatten()],
            confidence_N=out.confidence_BAK.flatten(),
            row_weights_N=position_weights(blocks.valid_BAK, self.decay).flatten(),
            weights=self.weights,
        )
