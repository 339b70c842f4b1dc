"""Views: whole or absent, one for each state of a drafter, also with several processes at once."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from dspark_serving.drafters import check_fit, make_view, read_spec
from dspark_serving.drafters.spec import DrafterSpec
from dspark_serving.errors import CheckpointError
from tests.published_formats import write_published
from tests.test_drafters_formats import TARGET


@pytest.fixture
def spec(tmp_path: Path) -> DrafterSpec:
    write_published(tmp_path / "drafter", TARGET, "llama-eagle3")
    return check_fit(read_spec(tmp_path / "drafter"), TARGET)


def make(path: str, root: str) -> str:
    return str(make_view(check_fit(read_spec(path), TARGET), Path(root)))


def test_processes_at_once_agree_on_one_view(spec: DrafterSpec, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        views = pool.starmap(make, [(str(spec.path), str(root))] * 12)
    assert len(set(views)) == 1
    assert os.listdir(root / "drafters") == [Path(views[0]).name]  # nothing half written is left


def test_the_same_drafter_gets_the_same_view(spec: DrafterSpec, tmp_path: Path) -> None:
    assert make_view(spec, tmp_path) == make_view(spec, tmp_path)


def test_a_changed_drafter_gets_another_view(spec: DrafterSpec, tmp_path: Path) -> None:
    before = make_view(spec, tmp_path)
    os.utime(spec.path / "model.safetensors", ns=(1, 1))
    after = make_view(spec, tmp_path)
    (spec.path / "calibration.json").write_text("{}")
    calibrated = make_view(spec, tmp_path)
    assert len({before, after, calibrated}) == 3
    assert (calibrated / "calibration.json").resolve() == spec.path / "calibration.json"
    assert not (after / "calibration.json").exists()


def test_a_reduced_vocabulary_becomes_a_file(spec: DrafterSpec, tmp_path: Path) -> None:
    view = make_view(spec, tmp_path)
    assert tuple(json.loads((view / "draft_vocab.json").read_text())["token_ids"]) == spec.draft_token_ids


def test_shards_and_their_index_are_linked(spec: DrafterSpec, tmp_path: Path) -> None:
    (spec.path / "model.safetensors").rename(spec.path / "part-1.safetensors")
    index = {"weight_map": {"fc.weight": "part-1.safetensors"}}
    (spec.path / "model.safetensors.index.json").write_text(json.dumps(index))
    view = make_view(spec, tmp_path)
    assert sorted(path.name for path in view.iterdir() if path.is_symlink()) == [
        "model.safetensors.index.json",
        "part-1.safetensors",
    ]


def test_a_place_that_cannot_be_written_is_a_clear_refusal(spec: DrafterSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        make_view(spec, tmp_path / "file")
