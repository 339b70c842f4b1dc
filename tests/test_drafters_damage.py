"""Damaged and hostile weights: every problem named, nothing executed, nothing absurd allocated; `dspark inspect`."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dspark_serving.cli.main import app
from dspark_serving.drafters import check_weights, read_spec
from dspark_serving.drafters.weights import weight_problems
from dspark_serving.errors import CheckpointError
from tests.published_formats import PUBLISHED, write_published
from tests.test_drafters_formats import TARGET, target_of


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


def spoil(weights: dict[str, torch.Tensor]) -> None:
    del weights["midlayer.mlp.up_proj.weight"], weights["midlayer.hidden_norm.weight"]
    weights["norm.weight"] = torch.ones(3)
    weights["unheard.of"] = torch.ones(2)
    weights["fc.weight"][0, 0] = torch.nan
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.float64)
    weights["midlayer.input_layernorm.weight"] = torch.ones(48, dtype=torch.int8)


SPOILT = (
    "layers.0.mlp.up_proj.weight is missing (shape [96, 48])",
    "layers.0.hidden_norm.weight is missing",
    "norm.weight has the shape [3] instead of [48]",
    "unheard.of ([2]) is unknown",
    "fc.weight holds values that are no finite numbers",
    "lm_head.weight has the type float64",
    "layers.0.input_layernorm.weight has the type int8",
)


def test_names_every_wrong_weight_at_once(tmp_path: Path) -> None:
    write_published(tmp_path, TARGET, "llama-eagle3")
    check_weights(read_spec(tmp_path))
    change_weights(tmp_path, spoil)
    with pytest.raises(CheckpointError) as refusal:
        check_weights(read_spec(tmp_path))
    for words in SPOILT:
        assert words in str(refusal.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_whichever_weight_is_missing(tmp_path: Path, name: str) -> None:
    write_published(tmp_path, target_of(name), name)
    spec = read_spec(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missed = []
    for key in weights:
        save_file({other: value for other, value in weights.items() if other != key}, tmp_path / "model.safetensors")
        if any("is missing" in problem for problem in weight_problems(spec)):
            missed.append(key)
    unneeded = {"t2d", "d2t"} | ({"embed_tokens.weight"} if not spec.own_embedding else set())
    unneeded |= {"lm_head.weight"} if not spec.own_head else set()
    assert set(missed) == set(weights) - unneeded


def huge_header(path: Path) -> None:
    """A header that claims ten gigabytes, in a file that has them (as a hole)."""
    with path.open("r+b") as file:
        file.write((10 * 2**30).to_bytes(8, "little"))
        file.truncate(11 * 2**30)


def claimed_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write((2**63).to_bytes(8, "little"))


def padded_header(path: Path) -> None:
    """A true header, padded with blanks to more than any checkpoint needs."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * 120_000_000
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


@pytest.mark.parametrize(
    "damage",
    [
        huge_header,
        claimed_header,
        padded_header,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\0" * 8),
        lambda path: path.write_bytes(b"\x80\x04" + b"." * 100),
    ],
)
@pytest.mark.parametrize("name", ["deepspec-dspark", "llama-eagle3"])
def test_damaged_files_are_refused_before_they_are_parsed(
    tmp_path: Path, damage: Callable[[Path], object], name: str
) -> None:
    write_published(tmp_path, TARGET, name)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is damaged"):
        check_weights(read_spec(tmp_path))


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_weights_and_remote_code_are_never_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "drafter"
    write_published(path, TARGET, "z-lab-dflash")
    ran = tmp_path / "ran"
    (path / "dflash.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    with caplog.at_level(logging.WARNING):
        check_weights(read_spec(path))
    assert "auto_map" in caplog.text
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(ran)))
    with pytest.raises(CheckpointError, match=r"only pickled weights .*never loaded"):
        check_weights(read_spec(path))
    assert not ran.exists()


@pytest.mark.parametrize("names", [{"fc.weight": "../secret.safetensors"}, {"fc.weight": 3}, {}, ["x"], None])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, names: Any) -> None:
    write_published(tmp_path, TARGET, "deepspec-dflash")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="weight_map"):
        check_weights(read_spec(tmp_path))


def test_tables_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    write_published(tmp_path, TARGET, "llama-eagle3")
    change_weights(tmp_path, lambda weights: weights["t2d"].fill_(False))
    with pytest.raises(CheckpointError, match="different ids"):
        read_spec(tmp_path)
    change_weights(tmp_path, lambda weights: weights["d2t"].add_(10**6))
    with pytest.raises(CheckpointError, match="ascending ids"):
        read_spec(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("d2t"))
    with pytest.raises(CheckpointError, match="d2t is missing"):
        read_spec(tmp_path)


def test_inspect_shows_the_drafter_and_every_problem(tmp_path: Path) -> None:
    drafter, target = tmp_path / "drafter", tmp_path / "target"
    write_published(drafter, TARGET, "llama-eagle3")
    target.mkdir()
    (target / "config.json").write_text(json.dumps(TARGET))
    command = ["inspect", str(drafter), "--target", str(target)]
    fits = CliRunner().invoke(app, command)
    assert fits.exit_code == 0
    assert all(words in fits.output for words in ("eagle3", "400 ids", "13 weights", "it fits"))
    (target / "config.json").write_text(json.dumps(TARGET | {"vocab_size": 600}))
    change_weights(drafter, spoil)
    broken = CliRunner().invoke(app, command)
    assert broken.exit_code == 1
    for words in (*SPOILT, "vocabulary size is 512, the target's 600", "cannot be served: 8 problems"):
        assert words in broken.output
    (drafter / "model.safetensors").unlink()
    assert CliRunner().invoke(app, command).exit_code == 2
