"""Warm starts: what is taken from checkpoints of every format and family, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from dspark_training.bundle.export import load_bundle
from dspark_training.config import DrafterShape
from dspark_training.models.backbone import BlockDrafter
from dspark_training.models.setup import new_drafter
from dspark_training.models.warm_start import warm_start
from dspark_training.target import Target
from safetensors.torch import load_file

from dspark_serving.drafters.spec import Family
from dspark_serving.errors import CheckpointError
from tests.published_formats import PUBLISHED, write_published
from tests.published_parts import RANK
from tests.tiny_models import VOCAB_SIZE, make_tiny_drafter, make_tiny_target

LAYER_IDS = (0, 2)
SCALE = 0.5 + torch.rand(2 * 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    make_tiny_target(path)
    return path


@pytest.fixture(scope="module")
def target(target_path: Path) -> Target:
    return Target.load(target_path)


def shape(**fields: Any) -> DrafterShape:
    sizes: dict[str, Any] = {"target_layer_ids": LAYER_IDS, "mask_token_id": 3, "markov_rank": 8}
    return DrafterShape(**sizes | fields)


def config_of(target_path: Path) -> dict[str, Any]:
    return dict(json.loads((target_path / "config.json").read_text()))


def published(path: Path, target_path: Path, **fields: Any) -> dict[str, torch.Tensor]:
    make_tiny_drafter(path, config_of(target_path), target_layer_ids=list(LAYER_IDS), **fields)
    return load_file(path / "model.safetensors")


def test_a_warm_drafter_computes_what_the_checkpoint_computes(
    target: Target, target_path: Path, tmp_path: Path
) -> None:
    published(tmp_path, target_path)
    original, _ = load_bundle(tmp_path)
    drafter = new_drafter(target, shape(block_size=4), "dspark", seed=0)
    start = warm_start(drafter, target, LAYER_IDS, SCALE, tmp_path)
    assert set(start.taken) == set(drafter.state_dict())
    assert not start.left
    assert isinstance(original, BlockDrafter)
    assert isinstance(drafter, BlockDrafter)
    features, anchors, ids = torch.randn(1, 9, 2 * 48), torch.tensor([[5]]), torch.tensor([[40]])
    want = original.hidden(features, anchors, ids, target.embed)
    torch.testing.assert_close(drafter.hidden(features * SCALE, anchors, ids, target.embed), want, rtol=1e-4, atol=1e-4)
    unscaled = drafter.hidden(features, anchors, ids, target.embed)
    assert not torch.allclose(unscaled, want, atol=1e-2)  # negative control: the scale matters


@pytest.mark.parametrize("parts", ["all", "heads", "backbone"])
def test_parts_are_taken_and_the_rest_stays(target: Target, target_path: Path, tmp_path: Path, parts: Any) -> None:
    published(tmp_path, target_path)
    drafter = new_drafter(target, shape(), "dspark", seed=0)
    before = {name: w.clone() for name, w in drafter.state_dict().items()}
    start = warm_start(drafter, target, LAYER_IDS, SCALE, tmp_path, parts)
    heads = {name for name in before if "head" in name}
    assert set(start.taken) == {"all": set(before), "heads": heads, "backbone": set(before) - heads}[parts]
    changed = {name for name, w in drafter.state_dict().items() if not torch.equal(w, before[name])}
    assert changed == set(start.taken)


def test_a_dflash_drafter_starts_from_the_backbone_of_a_dspark_one(
    target: Target, target_path: Path, tmp_path: Path
) -> None:
    weights = published(tmp_path, target_path)
    drafter = new_drafter(target, shape(), "dflash", seed=0)
    start = warm_start(drafter, target, LAYER_IDS, torch.ones(2 * 48), tmp_path)
    assert not start.left
    for name, weight in drafter.state_dict().items():
        torch.testing.assert_close(weight, weights[name])


def test_other_sizes_are_left_and_named(target: Target, target_path: Path, tmp_path: Path) -> None:
    published(tmp_path, target_path, layers=1)
    drafter = new_drafter(target, shape(markov_rank=4), "dspark", seed=0)
    start = warm_start(drafter, target, LAYER_IDS, SCALE, tmp_path)
    assert "layers.0.self_attn.q_proj.weight" in start.taken
    assert {"markov_head.markov_w1.weight", "confidence_head.proj.weight"} <= set(start.left)
    assert any(name.startswith("layers.1.") for name in start.left)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("algorithm", get_args(Family))
def test_every_published_format_is_a_start_for_every_algorithm(
    target: Target, target_path: Path, tmp_path: Path, name: str, algorithm: Family
) -> None:
    write_published(tmp_path, config_of(target_path), name, layer_ids=(0, 1, 2))
    drafter = new_drafter(target, shape(target_layer_ids=(0, 1, 2), markov_rank=RANK), algorithm, seed=0)
    start = warm_start(drafter, target, (0, 1, 2), torch.ones(3 * 48), tmp_path)
    assert {"fc.weight", "norm.weight", "layers.0.mlp.up_proj.weight"} <= set(start.taken)
    assert set(start.taken) | set(start.left) == set(drafter.state_dict())


def test_markov_rows_of_a_reduced_vocabulary_go_to_their_tokens(
    target: Target, target_path: Path, tmp_path: Path
) -> None:
    write_published(tmp_path, config_of(target_path), "speculators-dspark", layer_ids=LAYER_IDS)
    file = load_file(tmp_path / "model.safetensors")
    drafter = new_drafter(target, shape(markov_rank=RANK), "dspark", seed=0)
    warm_start(drafter, target, LAYER_IDS, SCALE, tmp_path, "heads")
    ids = torch.arange(len(file["d2t"])) + file["d2t"]
    assert isinstance(drafter, BlockDrafter)
    assert drafter.markov_head is not None
    w2 = drafter.markov_head.markov_w2.weight
    assert len(ids) < VOCAB_SIZE
    torch.testing.assert_close(w2[ids], file["markov_head.markov_w2.weight"])
    outside = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    outside[ids] = False
    assert not w2[outside].any()


def test_other_layers_another_target_and_nothing_that_fits_are_refused(
    target: Target, target_path: Path, tmp_path: Path
) -> None:
    published(tmp_path / "a", target_path)
    drafter = new_drafter(target, shape(target_layer_ids=(1, 2)), "dspark", seed=0)
    with pytest.raises(CheckpointError, match=r"layers \[0, 2\]"):
        warm_start(drafter, target, (1, 2), SCALE, tmp_path / "a")
    assert warm_start(drafter, target, (1, 2), SCALE, tmp_path / "a", "heads").taken
    make_tiny_drafter(tmp_path / "b", config_of(target_path) | {"num_hidden_layers": 6}, target_layer_ids=[0, 2])
    with pytest.raises(CheckpointError, match="another target"):
        warm_start(drafter, target, LAYER_IDS, SCALE, tmp_path / "b")
    smaller = new_drafter(target, shape(markov_rank=4, confidence_head=False), "dspark", seed=0)
    with pytest.raises(CheckpointError, match="markov_w1"):
        warm_start(smaller, target, LAYER_IDS, SCALE, tmp_path / "a", "heads")
    dflash = new_drafter(target, shape(), "dflash", seed=0)
    with pytest.raises(CheckpointError, match="no heads"):
        warm_start(dflash, target, LAYER_IDS, SCALE, tmp_path / "a", "heads")


def test_a_damaged_checkpoint_is_refused(target: Target, target_path: Path, tmp_path: Path) -> None:
    published(tmp_path, target_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    drafter = new_drafter(target, shape(), "dspark", seed=0)
    with pytest.raises(CheckpointError):
        warm_start(drafter, target, LAYER_IDS, SCALE, tmp_path)
