"""Tiny drafters of every family, exported as bundles, and what the bundles' files draft by the tests' own code."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from dspark_training.bundle.export import export_bundle
from dspark_training.config import DrafterShape
from dspark_training.data.vocab import DraftVocab
from dspark_training.models.setup import Drafter, new_drafter
from dspark_training.target import Target

from dspark_serving.drafters import canonical_names, make_view, read_spec
from dspark_serving.drafters.spec import Family
from tests.block_reference import BlockReference
from tests.eagle3_models import Drafter as Eagle3Reference
from tests.tiny_models import VOCAB_SIZE, Arch, make_tiny_target

LAYER_IDS = (0, 1, 2)
PROMPT = [40, 41, 42, 70, 71, 40, 41, 42, 90]
SOME_IDS = tuple(range(7, 407))


class Exported(NamedTuple):
    target: Target
    drafter: Drafter
    vocab: DraftVocab
    path: Path


def tiny_target(root: Path, arch: Arch = "llama") -> Target:
    if not (root / arch).exists():
        make_tiny_target(root / arch, arch)
    return Target.load(root / arch)


def tiny_drafter(target: Target, family: Family, head: str = "vanilla", *, confidence: bool = True) -> Drafter:
    """Random weights that bfloat16 holds exactly."""
    shape = tiny_shape(head, confidence=confidence)
    drafter = new_drafter(target, shape, family, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in drafter.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((0.3 * noise if parameter.ndim > 1 else 1 + 0.1 * noise).bfloat16())
    return drafter.eval()


def tiny_shape(head: str = "vanilla", *, confidence: bool = True) -> DrafterShape:
    return DrafterShape(
        num_layers=2, block_size=4, target_layer_ids=LAYER_IDS, mask_token_id=3, markov_rank=8,
        markov_head_type=head, confidence_head=confidence,
    )  # fmt: skip


def export_tiny(
    root: Path, family: Family, *, arch: Arch = "llama", head: str = "vanilla", ids: tuple[int, ...] | None = None
) -> Exported:
    """A drafter and its bundle at `root`/bundle; `ids` is a reduced draft vocabulary."""
    target = tiny_target(root, arch)
    drafter = tiny_drafter(target, family, head)
    vocab = DraftVocab(ids or range(VOCAB_SIZE), VOCAB_SIZE)
    scale = torch.ones(len(LAYER_IDS) * target.config.hidden_size)
    export_bundle(root / "bundle", drafter, target, tiny_shape(head), vocab, scale, "# a card\n", {"steps": 1})
    return Exported(target, drafter, vocab, root / "bundle")


@torch.no_grad()
def drafts_by_file(path: Path, target: Target, ids: list[int], root: Path) -> list[int]:
    """What the files of a drafter of any format draft behind the last of `ids`, by the tests' own implementations."""
    spec = read_spec(path)
    view = make_view(spec, root / "cache")  # canonical config.json, the weights as they are
    ids_BT = torch.tensor([ids])
    features = target.features(ids_BT, torch.ones_like(ids_BT), LAYER_IDS).context_BTM[0, :-1]
    if spec.family == "eagle3":
        chain = Eagle3Reference.read(view, target.model)
        chain = chain._replace(weights={name: rows.float() for name, rows in chain.weights.items()})
        return chain.draft(ids, features).tokens
    embedding, head = target.model.get_input_embeddings().weight, target.lm_head_weight_VD
    reference = BlockReference(view, embedding, head, canonical_names(spec.format))
    reference.weights = {name: rows.float() for name, rows in reference.weights.items()}
    return reference.draft(features, ids[-1]).tokens
