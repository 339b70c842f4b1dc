"""From samples to padded sequences, anchors and the labels of their blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_training.data.store import Sample


class Sequences(NamedTuple):
    """Padded conversations for one forward of the target."""

    keys: tuple[str, ...]  # of the samples
    ids_BT: Tensor
    mask_BT: Tensor  # 1 where a token is real
    supervised_BT: Tensor  # True where the assistant wrote the token

    def to(self, device: torch.device) -> Sequences:
        """The same on another device."""
        return Sequences(self.keys, *(part.to(device) for part in self[1:]))

    @property
    def predicting_BT(self) -> Tensor:
        """True at t where token t is an anchor or inside a block: t and t + 1 are both supervised."""
        predicting_BT = self.supervised_BT.clone()
        predicting_BT[:, :-1] &= self.supervised_BT[:, 1:]
        predicting_BT[:, -1] = False
        return predicting_BT


class Blocks(NamedTuple):
    """Anchors and what the rows of their blocks should predict."""

    anchors_BA: Tensor  # position p of x_0
    previous_BAK: Tensor  # ids x_0 .. x_{K-1}
    labels_BAK: Tensor  # ids x_1 .. x_K
    valid_BAK: Tensor  # True where the label exists and is supervised, contiguous from k = 0


def pad(samples: Sequence[Sample]) -> Sequences:
    """Right-pad the conversations of some samples, on the CPU."""
    ids_BT = torch.zeros(len(samples), max(len(s.ids) for s in samples), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    supervised_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for b, sample in enumerate(samples):
        ids_BT[b, : len(sample.ids)] = torch.tensor(sample.ids)
        mask_BT[b, : len(sample.ids)] = 1
        for start, end in sample.spans:
            supervised_BT[b, start:end] = True
    return Sequences(tuple(s.key for s in samples), ids_BT, mask_BT, supervised_BT)


def draw_anchors(sequences: Sequences, anchors: int, draws: int, rng: random.Random) -> list[Tensor]:
    """Draw `draws` disjoint sets of anchors; each is [B, A] with -1 where a sequence has no more.

    An anchor is a supervised token with at least one supervised token after it.
    """
    orders = []
    for row_T in sequences.predicting_BT:
        order = row_T.nonzero()[:, 0].tolist()
        rng.shuffle(order)
        orders.append(order)
    sets = [[order[i * anchors : (i + 1) * anchors] for order in orders] for i in range(draws)]
    return [stack_anchors(chosen) for chosen in sets if any(chosen)]


def stack_anchors(chosen: Sequence[Sequence[int]]) -> Tensor:
    """Anchors of each sequence as [B, A], -1 where a sequence has no more."""
    width = max(map(len, chosen))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in chosen])


def cut_blocks(sequences: Sequences, anchors_BA: Tensor, block_size: int) -> Blocks:
    """Cut the block of ids behind every anchor, where the sequences are; -1 anchors give invalid rows."""
    device = sequences.ids_BT.device
    anchors_BA = anchors_BA.to(device)
    safe_BA = anchors_BA.clamp_min(0)
    limit = sequences.ids_BT.shape[1] - 1
    positions_BAK = (safe_BA[..., None] + torch.arange(block_size, device=device)).clamp_max(limit)
    batch_B11 = torch.arange(len(safe_BA), device=device)[:, None, None]
    valid_BAK = sequences.predicting_BT[batch_B11, positions_BAK] & (anchors_BA >= 0)[..., None]
    return Blocks(
        safe_BA,
        sequences.ids_BT[batch_B11, positions_BAK],
        sequences.ids_BT[batch_B11, (positions_BAK + 1).clamp_max(limit)],
        valid_BAK.long().cumprod(-1).bool(),
    )
