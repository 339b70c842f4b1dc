"""The interface of feature sources, and the one without a cache: the frozen target runs in the training process."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_training.data.blocks import Sequences
from dspark_training.target import Target

_HEAD_ROWS = 256  # rows of full-vocabulary target logits held at once


class Features(NamedTuple):
    """The target's view of padded sequences, right-padded as they are. M = captured layers * D."""

    context_BTM: Tensor  # outputs of the captured layers, every dimension scaled to a root mean square of 1
    last_BTD: Tensor  # after the final norm: lm_head input of the next token
    normaliser_BT: Tensor  # log sum exp of the target's logits where `Sequences.predicting_BT`, else 0
    top_BT: Tensor  # the target's greedy next token there, else 0


class FeatureSource(Protocol):
    """Gives the features of sequences; may compute them or read them back."""

    def __call__(self, sequences: Sequences) -> Features: ...


class OnlineFeatures:
    """Runs the target over the sequences each time: no disk, no cache.

    Args:
        target: the frozen target.
        layer_ids: decoder layers whose output is captured (layer l is HF hidden_states[l + 1]).
        scale_M: factor of every captured dimension (models/setup.py, feature_scale).
    """

    def __init__(self, target: Target, layer_ids: tuple[int, ...], scale_M: Tensor | None = None) -> None:
        self._target, self._layer_ids, self._scale_M = target, layer_ids, scale_M

    @torch.no_grad()
    def __call__(self, sequences: Sequences) -> Features:
        context_BTM, last_BTD = self._target.features(sequences.ids_BT, sequences.mask_BT, self._layer_ids)
        if self._scale_M is not None:
            context_BTM = (context_BTM.float() * self._scale_M).to(context_BTM.dtype)
        normaliser_BT = last_BTD.new_zeros(last_BTD.shape[:2], dtype=torch.float32)
        top_BT = torch.zeros_like(sequences.ids_BT)
        wanted_BT = sequences.predicting_BT
        if wanted_BT.any():
            chunks = [self._head(chunk_ND) for chunk_ND in last_BTD[wanted_BT].split(_HEAD_ROWS)]
            normaliser_BT[wanted_BT] = torch.cat([normaliser_N for normaliser_N, _ in chunks])
            top_BT[wanted_BT] = torch.cat([top_N for _, top_N in chunks])
        return Features(context_BTM, last_BTD, normaliser_BT, top_BT)

    def _head(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        logits_NT = self._target.soft_cap(F.linear(hidden_ND, self._target.lm_head_weight_VD)).float()
        return logits_NT.logsumexp(-1), logits_NT.argmax(-1)
