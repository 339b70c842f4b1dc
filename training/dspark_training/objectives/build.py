"""The objective of an algorithm, and what all of them look like to training and evaluation."""

from __future__ import annotations

from typing import Protocol

from dspark_serving.drafters.spec import Family
from dspark_training.config import OptimConfig
from dspark_training.data.blocks import Blocks
from dspark_training.data.vocab import DraftVocab
from dspark_training.models.backbone import BlockDrafter
from dspark_training.models.eagle3 import Eagle3Drafter
from dspark_training.models.setup import Drafter
from dspark_training.objectives.block import BlockObjective
from dspark_training.objectives.eagle3 import Eagle3Objective
from dspark_training.objectives.losses import Losses, Weights
from dspark_training.objectives.supervision import Supervision
from dspark_training.target import Target


class Objective(Protocol):
    """Supervision and blocks in, losses out; see BlockObjective."""

    @property
    def drafter(self) -> Drafter: ...

    @property
    def vocab(self) -> DraftVocab: ...

    def __call__(self, supervision: Supervision, blocks: Blocks) -> Losses: ...


def build_objective(
    algorithm: Family, drafter: Drafter, target: Target, vocab: DraftVocab, optim: OptimConfig
) -> Objective:
    """The objective that trains `drafter`, which `new_drafter` made for the same algorithm.

    DSpark and DFlash take their weights from `optim`; Eagle3's objective has none to choose.

    Raises:
        TypeError: the drafter is of another algorithm.
    """
    if algorithm == "eagle3" and isinstance(drafter, Eagle3Drafter):
        return Eagle3Objective(drafter, target, vocab)
    if algorithm != "eagle3" and isinstance(drafter, BlockDrafter):
        weights = Weights(optim.ce_weight, optim.l1_weight, optim.confidence_weight)
        return BlockObjective(drafter, target, vocab, weights, optim.position_decay)
    raise TypeError(f"{type(drafter).__name__} is no drafter of {algorithm}")
