"""Greedy accepted length of a drafter and of prompt lookup on the same answers.

Greedy speculative decoding emits exactly the target's greedy text, so the rounds can be walked over a text that
is already there: at an anchor, the accepted drafts are the longest prefix of the block that equals the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dspark_training.data.blocks import cut_blocks, pad, stack_anchors
from dspark_training.data.store import Sample
from dspark_training.features.source import FeatureSource
from dspark_training.objectives.build import Objective
from dspark_training.objectives.supervision import supervise

_GROUP = 4


class Walk(NamedTuple):
    """The rounds of one greedy answer, or of the answers of one conversation."""

    accepted: list[int]  # accepted drafts of each round, without the bonus token
    verified: list[int]  # tokens of the answer behind each round's anchor: further drafts could not be judged


@torch.no_grad()
def walk_drafter(objective: Objective, source: FeatureSource, samples: Sequence[Sample]) -> list[Walk]:
    """Walk every greedy answer with the drafter, in the order of `samples` and their spans."""
    block_size, device = objective.drafter.dims.block_size, objective.drafter.norm.weight.device
    walks = []
    for first in range(0, len(samples), _GROUP):
        group = samples[first : first + _GROUP]
        sequences = pad(group).to(device)
        anchors = [[p for start, end in s.spans for p in range(start, end - 1)] for s in group]
        blocks = cut_blocks(sequences, stack_anchors(anchors), block_size)
        supervision = supervise(source, sequences, objective.vocab)
        agrees = objective(supervision, blocks).agrees_N.view_as(blocks.valid_BAK) & blocks.valid_BAK
        matched_BA = agrees.long().cumprod(-1).sum(-1)
        for sample, matched in zip(group, matched_BA.tolist(), strict=True):
            at = 0
            for start, end in sample.spans:
                walks.append(walk(matched[at : at + max(0, end - 1 - start)]))
                at += max(0, end - 1 - start)
    return walks


def walk(matched: Sequence[int]) -> Walk:
    """Visit anchors 0, 1 + matched[0], ...: `matched[i]` drafts agree with the text behind token i."""
    anchors, at = [], 0
    while at < len(matched):
        anchors.append(at)
        at += 1 + matched[at]
    return Walk([matched[at] for at in anchors], [len(matched) - at for at in anchors])


def walk_prompt_lookup(sample: Sample, block_size: int, longest: int = 3) -> Walk:
    """The baseline without a drafter, on every answer: copy what followed the last newest 3-, 2- or 1-gram."""
    rounds = Walk([], [])
    for start, end in sample.spans:
        ids = sample.ids[:end]
        found = walk([_lookup_match(ids, p, block_size, longest) for p in range(start, end - 1)])
        rounds = Walk(rounds.accepted + found.accepted, rounds.verified + found.verified)
    return rounds


def _lookup_match(ids: list[int], anchor: int, block_size: int, longest: int) -> int:
    """How many of the looked-up tokens equal what really follows the anchor."""
    for n in range(longest, 0, -1):
        tail = ids[anchor + 1 - n : anchor + 1]
        for start in range(anchor - n, -1, -1):
            if ids[start : start + n] == tail:
                draft = ids[start + n : min(anchor + 1, start + n + block_size)]
                real = ids[anchor + 1 : anchor + 1 + len(draft)]
                same = [a == b for a, b in zip(draft, real, strict=False)]
                return same.index(False) if False in same else len(same)
    return 0
