"""What an optimizer step looks at: groups of sequences, pooled and shuffled, the same for any number of processes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from dspark_training.config import OptimConfig
from dspark_training.data.blocks import Sequences, draw_anchors, pad
from dspark_training.data.store import Sample


class Draw(NamedTuple):
    """The sequences of one target forward, and one set of anchors in them."""

    forward: int  # number of the forward since the beginning
    sequences: Sequences
    anchors_BA: Tensor  # -1 where a sequence has no more


class Pool(NamedTuple):
    """The optimizer steps that a few target forwards feed."""

    forwards: int
    tokens: int  # of all its sequences
    steps: list[list[Draw]]  # per step, the micro-batches of all processes


def pools(samples: Sequence[Sample], optim: OptimConfig, seed: int, forwards: int) -> Iterator[Pool]:
    """Endless pools from forward number `forwards` on.

    A pool's forwards are dealt into `micro_batches` lanes; step s takes the s-th of each lane's shuffled draws. A
    process that computes every n-th lane thus needs the target for its own lanes only.
    """
    groups = _groups(samples, optim.sequences, seed, forwards)
    while True:
        rng = random.Random(f"anchors/{seed}/{forwards}")
        chosen = list(itertools.islice(groups, optim.pool))
        lanes: list[list[Draw]] = [[] for _ in range(optim.micro_batches)]
        for i, sequences in enumerate(chosen):
            draws = draw_anchors(sequences, optim.anchors, optim.steps_per_forward, rng)
            lanes[i % optim.micro_batches] += [Draw(forwards + i, sequences, anchors_BA) for anchors_BA in draws]
        for lane in lanes:
            rng.shuffle(lane)
        forwards += len(chosen)
        tokens = sum(int(sequences.mask_BT.sum()) for sequences in chosen)
        yield Pool(forwards, tokens, [list(step) for step in zip(*lanes, strict=False)])


def _groups(samples: Sequence[Sample], size: int, seed: int, to_skip: int) -> Iterator[Sequences]:
    """Endless groups of sequences of similar length, each epoch in another order."""
    lengths = [len(sample.ids) for sample in samples]
    for epoch in itertools.count():
        rng = random.Random(f"epoch/{seed}/{epoch}")
        order = list(range(len(lengths)))
        rng.shuffle(order)
        groups = _similar_lengths(order, lengths, size)
        rng.shuffle(groups)
        yield from (pad([samples[place] for place in group]) for group in groups[to_skip:])
        to_skip = max(0, to_skip - len(groups))


def _similar_lengths(order: list[int], lengths: list[int], size: int) -> list[list[int]]:
    """Cut shuffled places into groups of `size`, sorted by length within windows so that little is padded."""
    window = size * 8
    groups = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lengths.__getitem__)
        groups += [part[i : i + size] for i in range(0, len(part), size)]
    return [g for g in groups if len(g) == size] or groups
