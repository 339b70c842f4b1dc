"""Reading drafters: what is accepted, and one clear refusal for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_serving.drafters import check_fit, check_target_files, check_weights, read_spec
from dspark_serving.errors import CheckpointError
from dspark_serving.sglang_adapter.resolution import check_drafter
from tests.tiny_models import make_tiny_drafter, make_tiny_target

Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("target")
    return path, make_tiny_target(path)


@pytest.fixture
def drafter(tmp_path: Path, target: tuple[Path, dict[str, Any]]) -> Path:
    make_tiny_drafter(tmp_path / "drafter", target[1], draft_vocab=list(range(10, 90)))
    return tmp_path / "drafter"


def config_with(**fields: Any) -> Edit:
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        config.update(fields)
        (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return edit


def weights_with(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, path / "model.safetensors")

    return edit


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lie_about_offsets(path: Path) -> None:
    file = path / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(b"[0,", b"[9,", 1)
    file.write_bytes(content[:8] + header + content[8 + size :])


def pickle_instead(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def fill_nan(weights: dict[str, torch.Tensor]) -> None:
    weights["fc.weight"][0, 0] = torch.nan


REFUSED: dict[str, tuple[Edit, str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "config.json does not exist"),
    "config is no JSON": (lambda path: (path / "config.json").write_text("{"), "cannot be read"),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), "holds a list"),
    "unknown architecture": (config_with(architectures=["MysteryModel"]), "MysteryModel"),
    "unknown Markov head": (config_with(markov_head_type="hopfield"), "hopfield"),
    "no Markov head": (config_with(markov_rank=0), "confidence_head_with_markov without a Markov head"),
    "field missing": (config_with(block_size=None), "block_size is None"),
    "field of a wrong type": (config_with(block_size="five"), "block_size is 'five'"),
    "mask token outside": (config_with(mask_token_id=512), "mask_token_id is 512"),
    "last layer": (config_with(target_layer_ids=[0, 3]), "the last layer's output is not available"),
    "layer outside": (config_with(target_layer_ids=[0, 9]), "target_layer_ids"),
    "layers unordered": (config_with(target_layer_ids=[2, 0]), "target_layer_ids"),
    "other hidden size": (config_with(hidden_size=64), "hidden size is 64"),
    "other vocabulary": (config_with(vocab_size=999), "vocabulary size is 999"),
    "other depth": (config_with(num_target_layers=12), "number of target layers is 12"),
    "draft vocabulary of another size": (config_with(draft_vocab_size=7), "draft_vocab.json"),
    "draft vocabulary not declared": (config_with(draft_vocab_size=None), "draft_vocab_size is missing"),
    "draft ids not ascending": (
        lambda path: (path / "draft_vocab.json").write_text(json.dumps({"token_ids": [5] * 80})),
        "different ids",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "does not exist"),
    "pickled weights": (pickle_instead, "pickled"),
    "truncated": (truncate, "damaged"),
    "header lies": (lie_about_offsets, "damaged"),
    "weight missing": (weights_with(lambda w: w.pop("layers.1.mlp.up_proj.weight")), "layers.1.mlp.up_proj.weight"),
    "weight unknown": (weights_with(lambda w: w.update(extra=torch.ones(1))), "extra ([1]) is unknown"),
    "weight of another shape": (weights_with(lambda w: w.update({"norm.weight": torch.ones(5)})), "norm.weight"),
    "weight not finite": (weights_with(fill_nan), "fc.weight holds values"),
    "confidence head missing": (
        weights_with(lambda w: w.pop("confidence_head.proj.weight")),
        "confidence_head.proj.weight",
    ),
}


def test_accepts_what_fits(drafter: Path, target: tuple[Path, dict[str, Any]]) -> None:
    spec = check_drafter(str(target[0]), str(drafter), "dspark")
    assert (spec.gamma, spec.layers, spec.mask_token_id, spec.has_confidence) == (4, 2, 3, True)
    assert spec.draft_token_ids == tuple(range(10, 90))


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_accepts_every_markov_head_and_the_frozen_copies(
    tmp_path: Path, target: tuple[Path, dict[str, Any]], kind: str
) -> None:
    make_tiny_drafter(tmp_path, target[1], markov_head_type=kind, confidence=False)
    weights_with(lambda w: w.update({"lm_head.weight": torch.ones(2, 2)}))(tmp_path)
    check_weights(read_spec(tmp_path))


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_in_one_clear_line(drafter: Path, target: tuple[Path, dict[str, Any]], name: str) -> None:
    edit, expected = REFUSED[name]
    edit(drafter)
    with pytest.raises(CheckpointError) as refusal:
        check_drafter(str(target[0]), str(drafter), "dspark")
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_refuses_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_spec(tmp_path / "nowhere")


def test_reads_the_text_config_of_a_multimodal_target(drafter: Path, target: tuple[Path, dict[str, Any]]) -> None:
    spec = read_spec(drafter)
    check_fit(spec, {"text_config": target[1], "hidden_size": 1})
    with pytest.raises(CheckpointError, match="hidden size"):
        check_fit(spec, {"text_config": target[1] | {"hidden_size": 1}})


def test_finds_a_damaged_target(tmp_path: Path) -> None:
    make_tiny_target(tmp_path)
    check_target_files(tmp_path)
    truncate(tmp_path)
    with pytest.raises(CheckpointError, match="damaged"):
        check_target_files(tmp_path)
