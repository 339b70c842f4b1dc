"""Damaged bundles are named, and nothing that goes wrong while writing one destroys the one before."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dspark_training.bundle import export
from dspark_training.bundle.amend import amending
from dspark_training.bundle.export import export_bundle, load_bundle
from dspark_training.bundle.manifest import check_manifest, manifest_problems
from dspark_training.bundle.publish import replacing
from typer.testing import CliRunner

from dspark_serving.cli.main import app
from dspark_serving.errors import CheckpointError, OptionError
from tests.bundle_models import SOME_IDS, Exported, export_tiny, tiny_shape


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("bundle"), "dspark", ids=SOME_IDS)


@pytest.fixture
def bundle(made: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.path, tmp_path / "bundle"))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def export_again(made: Exported, directory: Path) -> None:
    scale = torch.full((made.drafter.fc.in_features,), 2.0)
    export_bundle(directory, made.drafter, made.target, tiny_shape(), made.vocab, scale, "another card", {})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("model.safetensors", truncate, "model.safetensors has .* bytes instead of"),
        ("model.safetensors", flip, "model.safetensors has another content"),
        ("config.json", lambda path: path.write_text(path.read_text().replace("0.0", "0.5", 1)), "config.json has"),
        ("draft_vocab.json", flip, "draft_vocab.json has another content"),
        ("manifest.json", truncate, "manifest.json cannot be used"),
    ],
)
def test_damage_is_named(bundle: Path, name: str, damage: Callable[[Path], object], words: str) -> None:
    damage(bundle / name)
    with pytest.raises(CheckpointError, match=words):
        load_bundle(bundle)
    for command in (["bundle", "verify"], ["inspect"]):
        done = CliRunner().invoke(app, [*command, str(bundle)])
        assert done.exit_code in (1, 2)
        assert name in done.output + done.stderr


def test_every_file_is_in_the_manifest(bundle: Path) -> None:
    check_manifest(bundle)
    assert CliRunner().invoke(app, ["bundle", "verify", str(bundle)]).exit_code == 0
    flip(bundle / "README.md")
    (bundle / "stray.txt").write_text("")
    assert manifest_problems(bundle) == [
        "README.md has another content (SHA-256)", "stray.txt is not in manifest.json"
    ]  # fmt: skip
    load_bundle(bundle)  # neither is what a drafter is made of


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_a_manifest_cannot_point_outside(bundle: Path, name: str) -> None:
    path = bundle / "manifest.json"
    found = json.loads(path.read_text())
    found["files"][name] = found["files"]["config.json"]
    path.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="files inside the bundle"):
        check_manifest(bundle)


def test_a_full_disk_leaves_the_old_bundle(made: Exported, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(bundle)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export_again(made, bundle)
    assert contents(bundle) == before
    assert os.listdir(bundle.parent) == [bundle.name]


def test_a_weight_that_is_no_number_leaves_the_old_bundle(made: Exported, bundle: Path) -> None:
    before = contents(bundle)
    scale = torch.full((made.drafter.fc.in_features,), float("nan"))
    with pytest.raises(CheckpointError, match=r"fc\.weight holds values that are no finite numbers"):
        export_bundle(bundle, made.drafter, made.target, tiny_shape(), made.vocab, scale, "card", {})
    assert contents(bundle) == before


def test_an_export_replaces_everything(made: Exported, bundle: Path) -> None:
    (bundle / "calibration.json").write_text("of the old drafter")
    export_again(made, bundle)
    check_manifest(bundle)
    assert not (bundle / "calibration.json").exists()
    assert (bundle / "README.md").read_text() == "another card"
    assert os.listdir(bundle.parent) == [bundle.name]


def test_a_process_that_is_killed_between_the_renames_loses_nothing(made: Exported, bundle: Path) -> None:
    os.replace(bundle, bundle.with_name(".bundle.old"))
    with pytest.raises(ZeroDivisionError), replacing(bundle):
        raise ZeroDivisionError
    check_manifest(bundle)
    load_bundle(bundle)


def test_a_failed_exchange_puts_the_old_bundle_back(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = contents(bundle), os.replace

    def refuses_the_new_one(source: Path, place: Path) -> None:
        if source.name.endswith(".partial"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        rename(source, place)

    monkeypatch.setattr(os, "replace", refuses_the_new_one)
    with pytest.raises(CheckpointError, match="Permission denied"), replacing(bundle) as partial:
        (partial / "config.json").write_text("{}")
    assert contents(bundle) == before


def test_nothing_but_a_bundle_is_replaced(tmp_path: Path, made: Exported) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OptionError, match="holds no bundle"):
        export_again(made, tmp_path)
    with pytest.raises(OptionError, match="is no bundle"), amending(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").exists()
