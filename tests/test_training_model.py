"""The plain drafter: what it may look at, and that training's short cuts equal real speculative decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from dspark_training.bundle.export import export_bundle, load_bundle
from dspark_training.config import DrafterShape
from dspark_training.data.store import Sample
from dspark_training.data.vocab import DraftVocab
from dspark_training.evaluation.walk import walk, walk_drafter, walk_prompt_lookup
from dspark_training.features.source import OnlineFeatures
from dspark_training.models.backbone import BlockDrafter
from dspark_training.objectives.block import BlockObjective
from dspark_training.objectives.losses import Weights
from dspark_training.target import Target

from dspark_serving.drafters import DrafterSpec, check_fit, check_weights
from tests.oracle import speculative_decode
from tests.tiny_models import make_tiny_drafter, make_tiny_target

PROMPT = [40, 41, 42, 70, 71, 40, 41, 42, 90]


class Tiny(NamedTuple):
    root: Path
    target: Target
    drafter: BlockDrafter
    spec: DrafterSpec


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    config = make_tiny_target(root / "target", "llama")
    make_tiny_drafter(root / "drafter", config, gamma=4)
    target = Target.load(root / "target")
    drafter, spec = load_bundle(root / "drafter")
    assert isinstance(drafter, BlockDrafter)
    return Tiny(root, target, drafter, spec)


def features_of(target: Target, spec: DrafterSpec, ids: list[int]) -> torch.Tensor:
    ids_BT = torch.tensor([ids])
    return target.features(ids_BT, torch.ones_like(ids_BT), spec.target_layer_ids).context_BTM


def test_captured_features_are_hf_hidden_states(tiny: Tiny) -> None:
    _, target, _, spec = tiny
    ids = torch.tensor([PROMPT])
    hidden = target.model(ids, output_hidden_states=True).hidden_states
    want = torch.cat([hidden[i + 1] for i in spec.target_layer_ids], -1)
    torch.testing.assert_close(features_of(target, spec, PROMPT), want)


def test_a_block_sees_the_context_before_its_anchor_and_nothing_behind(tiny: Tiny) -> None:
    _, target, drafter, spec = tiny
    features = features_of(target, spec, PROMPT)
    anchors, ids = torch.tensor([[5]]), torch.tensor([[PROMPT[5]]])
    embedding = target.embed
    base = drafter.hidden(features, anchors, ids, embedding)
    hidden_part, seen_part = features.clone(), features.clone()
    hidden_part[:, 5:] += 10.0
    seen_part[:, 4] += 10.0
    torch.testing.assert_close(drafter.hidden(hidden_part, anchors, ids, embedding), base)
    assert not torch.allclose(drafter.hidden(seen_part, anchors, ids, embedding), base)  # negative control


def test_confidence_of_a_position_does_not_see_its_own_token(tiny: Tiny) -> None:
    _, target, drafter, spec = tiny
    features = features_of(target, spec, PROMPT)
    anchors = torch.tensor([[5]])
    hidden = drafter.hidden(features, anchors, torch.tensor([[PROMPT[5]]]), target.embed)
    drafted = torch.tensor([[[PROMPT[5], 10, 11, 12]]])  # x_0 .. x_3; row k predicts x_{k+1}
    changed = drafted.clone()
    changed[..., 2] = 300  # x_2: only rows 2 and later may notice
    before, after = drafter.confidence(hidden, drafted), drafter.confidence(hidden, changed)
    torch.testing.assert_close(before[..., :2], after[..., :2])
    assert not torch.allclose(before[..., 2], after[..., 2])


def test_speculative_decoding_emits_the_targets_own_greedy_text(tiny: Tiny) -> None:
    _, target, drafter, spec = tiny
    decoded = speculative_decode(drafter, target.model, spec.target_layer_ids, PROMPT, 24)
    alone = target.model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)[0, len(PROMPT) :]
    assert decoded.tokens[: len(alone)] == alone.tolist()


def test_the_walk_equals_the_real_loop(tiny: Tiny) -> None:
    _, target, drafter, spec = tiny
    vocab = DraftVocab(range(spec.vocab_size), spec.vocab_size)
    objective = BlockObjective(drafter, target, vocab, Weights(0.1, 0.9, 1.0), 4.0)
    decoded = speculative_decode(drafter, target.model, spec.target_layer_ids, PROMPT, 40)
    answer = decoded.tokens
    sample = Sample("x", "math", 0.0, PROMPT + answer, [(len(PROMPT), len(PROMPT) + len(answer))])
    got = walk_drafter(objective, OnlineFeatures(target, spec.target_layer_ids), [sample])[0].accepted
    inside = [n for n, end in zip(decoded.accepted, _ends(decoded.accepted), strict=True) if end < len(answer)]
    assert got[: len(inside)] == inside


def _ends(accepted: list[int]) -> list[int]:
    """Index of the newest token after each round; the prefill gave token 0."""
    at, ends = 0, []
    for n in accepted:
        at += n + 1
        ends.append(at)
    return ends


def test_walk_counts_rounds() -> None:
    assert walk([2, 0, 1, 0, 0]) == ([2, 0, 0], [5, 2, 1])


def test_prompt_lookup_copies_what_followed_the_longest_match() -> None:
    ids = [1, 2, 3, 9, 8, 1, 2, 3, 9, 8]
    sample = Sample("x", "math", 0.0, ids, [(5, 10)])
    # from token 1 (a 1-gram seen before): 2 3 9 8 follow, all of them right
    assert walk_prompt_lookup(sample, block_size=5).accepted == [4]
    assert walk_prompt_lookup(Sample("y", "math", 0.0, [1, 2, 5, 6, 7], [(2, 5)]), block_size=5).accepted == [0, 0]
    two_answers = Sample("z", "math", 0.0, [*ids, 4, 1, 2, 3], [(5, 10), (11, 14)])
    assert walk_prompt_lookup(two_answers, block_size=5) == ([4, 2], [4, 2]), "every answer counts"


def test_an_exported_bundle_drafts_like_the_trained_drafter(tiny: Tiny, tmp_path: Path) -> None:
    root, target, drafter, spec = tiny
    shape = DrafterShape(
        num_layers=2, block_size=4, target_layer_ids=spec.target_layer_ids, mask_token_id=3, markov_rank=8
    )
    vocab = DraftVocab([3, 5, 40, 41, 300], spec.vocab_size)
    scale = torch.rand(features_of(target, spec, PROMPT).shape[-1]) + 0.5
    export_bundle(tmp_path / "bundle", drafter, target, shape, vocab, scale, "card", {"steps": 1})
    served, served_spec = load_bundle(tmp_path / "bundle")
    assert isinstance(served, BlockDrafter)
    check_weights(served_spec)
    check_fit(served_spec, json.loads((root / "target" / "config.json").read_text()))
    assert served_spec.draft_token_ids == (3, 5, 40, 41, 300)
    features = features_of(target, spec, PROMPT)
    anchors, ids = torch.tensor([[6]]), torch.tensor([[PROMPT[6]]])
    trained = drafter.hidden(features * scale, anchors, ids, target.embed)
    exported = served.hidden(features, anchors, ids, target.embed)
    torch.testing.assert_close(exported, trained, rtol=0.05, atol=0.05)  # bf16 weights
    assert (exported - trained).norm() / trained.norm() < 0.01
