"""Held-out accepted length, cheap enough to measure during training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from dspark_serving.errors import DataError
from dspark_training.data.blocks import cut_blocks, pad, stack_anchors
from dspark_training.data.store import Sample
from dspark_training.data.vocab import DraftVocab
from dspark_training.features.source import FeatureSource
from dspark_training.objectives.build import Objective
from dspark_training.objectives.supervision import supervise

_MAX_SAMPLES = 32
_GROUP = 4
_STRIDE = 3  # every third answer token is an anchor


class Validation:
    """Teacher-forced greedy acceptance on held-out samples; the target runs over them once, at construction.

    On answers that the target decoded greedily, the mean over anchors of the accepted length is what a
    speculative decoder would see at those anchors (it visits fewer of them, so its mean differs a little).

    Raises:
        DataError: not one of the samples has two tokens in a row by the assistant.
    """

    def __init__(self, samples: Sequence[Sample], source: FeatureSource, vocab: DraftVocab) -> None:
        self._items = []
        chosen = [s for s in samples if s.has_anchor][:_MAX_SAMPLES]
        if not chosen:
            raise DataError(
                f"none of the {len(samples)} held-out samples can be judged",
                expected="answers of at least two tokens",
                fix="Train on more samples, or set a larger data.validation_share.",
            )
        for domain in sorted({s.domain for s in chosen}):
            part = [s for s in chosen if s.domain == domain]
            for start in range(0, len(part), _GROUP):
                sequences = pad(part[start : start + _GROUP]).to(vocab.ids_V.device)
                supervision = supervise(source, sequences, vocab)
                self._items.append((domain, sequences, supervision))

    @torch.no_grad()
    def run(self, objective: Objective, block_size: int) -> dict[str, float | list[float]]:
        """Accepted length (bonus included) over all and by domain, and conditional acceptance by position."""
        lengths: dict[str, list[int]] = defaultdict(list)
        reached, kept = torch.zeros(block_size), torch.zeros(block_size)
        loss_sum = 0.0
        for domain, sequences, supervision in self._items:
            anchors = [row_T.nonzero()[::_STRIDE, 0].tolist() for row_T in sequences.predicting_BT]
            blocks = cut_blocks(sequences, stack_anchors(anchors), block_size)
            losses = objective(supervision, blocks)
            loss_sum += losses.total.item()
            full_NK = blocks.valid_BAK.flatten(0, 1)
            agrees_NK = losses.agrees_N.view_as(full_NK) & full_NK
            survives_NK = agrees_NK.long().cumprod(-1)
            rows = full_NK[:, 0]
            lengths[domain] += (1 + survives_NK.sum(-1))[rows].tolist()
            before_NK = torch.cat([torch.ones_like(survives_NK[:, :1]), survives_NK[:, :-1]], -1) * full_NK
            reached += before_NK.sum(0).cpu()
            kept += (survives_NK * full_NK).sum(0).cpu()
        everything = [n for values in lengths.values() for n in values]
        return {
            "validation_loss": loss_sum / len(self._items),
            "accepted_length": sum(everything) / len(everything),
            **{f"accepted_length_{d}": sum(v) / len(v) for d, v in sorted(lengths.items())},
            "conditional_acceptance": [round(float(x), 3) for x in kept / reached.clamp_min(1)],
        }
