"""From samples to padded sequences, anchors and the labels of their blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_training.data import Sample


class Sequences(NamedTuple):
    """Padded sequences for one forward of the target."""

    ids_BT: Tensor
    mask_BT: Tensor  # 1 where a token is real
    answer_starts: list[int]
    ends: list[int]


class Blocks(NamedTuple):
    """Anchors and what the rows of their blocks should predict."""

    anchors_BA: Tensor  # position p of x_0
    previous_BAK: Tensor  # ids x_0 .. x_{K-1}
    labels_BAK: Tensor  # ids x_1 .. x_K
    valid_BAK: Tensor  # True where the label exists, contiguous from k = 0


def pad(samples: Sequence[Sample]) -> Sequences:
    """Right-pad prompt + answer of each sample."""
    rows = [s.prompt_ids + s.answer_ids for s in samples]
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row)] = torch.tensor(row)
        mask_BT[b, : len(row)] = 1
    return Sequences(ids_BT, mask_BT, [len(s.prompt_ids) for s in samples], [len(r) for r in rows])


def draw_anchors(sequences: Sequences, anchors: int, draws: int, rng: random.Random) -> list[Tensor]:
    """Draw `draws` disjoint sets of anchors; each is [B, A] with -1 where a sequence has no more.

    An anchor is an answer token with at least one answer token after it.
    """
    orders = []
    for start, end in zip(sequences.answer_starts, sequences.ends, strict=True):
        order = list(range(start, end - 1))
        rng.shuffle(order)
        orders.append(order)
    sets = []
    for i in range(draws):
        chosen = [order[i * anchors : (i + 1) * anchors] for order in orders]
        width = max(map(len, chosen))
        if width:
            sets.append(torch.tensor([c + [-1] * (width - len(c)) for c in chosen]))
    return sets


def cut_blocks(sequences: Sequences, anchors_BA: Tensor, block_size: int) -> Blocks:
    """Cut the block of ids behind every anchor; -1 anchors give invalid rows."""
    ends_B = torch.tensor(sequences.ends)
    safe_BA = anchors_BA.clamp_min(0)
    positions_BAK = safe_BA[..., None] + torch.arange(block_size)
    limit = sequences.ids_BT.shape[1] - 1
    batch_B11 = torch.arange(len(ends_B))[:, None, None]
    valid_BAK = (positions_BAK + 1 < ends_B[:, None, None]) & (anchors_BA >= 0)[..., None]
    return Blocks(
        safe_BA,
        sequences.ids_BT[batch_B11, positions_BAK.clamp_max(limit)],
        sequences.ids_BT[batch_B11, (positions_BAK + 1).clamp_max(limit)],
        valid_BAK,
    )
