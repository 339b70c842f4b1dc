"""Cost tables on disk: what is saved comes back, and nothing else is taken for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dspark_serving.errors import DataError
from dspark_serving.scheduler.cost import CostModel
from dspark_serving.scheduler.cost_table import CostKey, load_cost, save_cost
from tests.cost_world import GAMMA, World

KEY = CostKey(
    device="cpu-x86", model="smollm2:1", drafter="d:2", dtype="bfloat16", tp_size=1, attention_backend="torch_native",
    threads=2, gamma=GAMMA, tiers=None, sglang="0.5.23", plugin="0.1",
)  # fmt: skip


def fitted(tiers: tuple[int, ...] | None = None) -> CostModel:
    return CostModel.fit(World(tiers).profile(np.random.default_rng(0)), tiers)


@pytest.mark.parametrize("tiers", [None, (6, 12, 24, 48, 96)])
def test_round_trip(tmp_path: Path, tiers: tuple[int, ...] | None) -> None:
    model, key = fitted(tiers), KEY.model_copy(update={"tiers": tiers})
    path = save_cost(tmp_path / "costs", key, model)
    loaded = load_cost(tmp_path / "costs", key)
    assert loaded is not None
    assert (loaded.tiers, loaded.samples) == (tiers, model.samples)
    totals = np.arange(3, 60)
    np.testing.assert_array_equal(loaded.verify(3, totals, 999), model.verify(3, totals, 999))
    assert (loaded.draft(3), loaded.plain(3, 999)) == (model.draft(3), model.plain(3, 999))
    assert list(path.parent.iterdir()) == [path]  # nothing half-written stays


def test_saving_again_replaces(tmp_path: Path) -> None:
    save_cost(tmp_path, KEY, fitted())
    model = CostModel.fit(World(speed=2.0).profile(np.random.default_rng(1)))
    save_cost(tmp_path, KEY, model)
    loaded = load_cost(tmp_path, KEY)
    assert loaded is not None
    assert loaded.samples == model.samples


def test_a_model_for_other_graphs_than_the_keys_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="graphs"):
        save_cost(tmp_path, KEY, fitted((6, 12, 24, 48, 96)))


@pytest.mark.parametrize(
    "change",
    [{"device": "h100"}, {"model": "other"}, {"drafter": "other"}, {"dtype": "float32"}, {"tp_size": 2},
     {"attention_backend": "fa3"}, {"threads": 1}, {"gamma": 7}, {"tiers": (8, 16)}, {"sglang": "0.6"},
     {"plugin": "0.2"}],
)  # fmt: skip
def test_another_key_finds_nothing_and_refuses_a_renamed_file(tmp_path: Path, change: dict[str, Any]) -> None:
    other = CostKey(**{**KEY.model_dump(), **change})
    path = save_cost(tmp_path, KEY, fitted())
    assert load_cost(tmp_path, other) is None
    path.rename(tmp_path / other.file_name)
    with pytest.raises(DataError, match=f"holds for {next(iter(change))}"):
        load_cost(tmp_path, other)


def damaged(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "version 1"),
        ({"format": "other"}, "format"),
        ({"samples": []}, "no cost samples"),
        ({"samples": [[1, 6, 100, 0.01, -0.1, True]]}, "impossible cost sample"),
        ({"samples": [[1, 6, 100, -0.01, 0.1, True]]}, "impossible cost sample"),
        ({"samples": [[1, 6, 100, 0.01, float("nan"), True]]}, "damaged|impossible"),
        ({"samples": [[1, 7, 100, 0.01, 0.1, True]]}, "block size 5"),
        ({"samples": [[1, 1, 100, 0.0, 5e-324, False]]}, "impossible"),
        ({"samples": [[1, 1, 10**400, 0.0, 0.1, False]]}, "impossible"),
        ({"samples": [[1, 6, 100]]}, "damaged"),
        ({"samples": [[1, 6, 100, "fast", 0.1, True]]}, "damaged"),
        ({"tiers": [0]}, "damaged"),
        ({"key": {}}, "damaged"),
        ({"extra": 1}, "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    damaged(save_cost(tmp_path, KEY, fitted()), **changes)
    with pytest.raises(DataError, match=message) as error:
        load_cost(tmp_path, KEY)
    assert error.value.fix


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_files_that_are_no_tables_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / KEY.file_name).write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        load_cost(tmp_path, KEY)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save_cost(tmp_path, KEY, fitted())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged"):
        load_cost(tmp_path, KEY)


def test_missing_file_and_directory_are_no_error(tmp_path: Path) -> None:
    assert load_cost(tmp_path, KEY) is None
    assert load_cost(tmp_path / "none", KEY) is None


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / KEY.file_name).mkdir()
    with pytest.raises(DataError, match="cannot read"):
        load_cost(tmp_path, KEY)


def test_an_unknown_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without data"):
        save_cost(tmp_path, KEY, CostModel.unknown())
    assert not list(tmp_path.iterdir())


def test_key_is_frozen_and_strict() -> None:
    with pytest.raises(ValidationError):
        KEY.gamma = 7  # type: ignore[misc]
    with pytest.raises(ValidationError):
        CostKey(**{**KEY.model_dump(), "gamma": 0})
