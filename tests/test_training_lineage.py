"""The runs behind a drafter's weights: kept from bundle to bundle, told in the card, added up in the curves."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from dspark_training.bundle.lineage import earlier_runs, told
from dspark_training.config import WarmStartConfig

from benchmarks.training import rows_of


def made(steps: int, hours: float, **more: Any) -> dict[str, Any]:
    """A training.json."""
    point = {"tokens": 60 * steps, "seconds": 1800 * hours, "accepted_length": 2.0, "conditional_acceptance": [0.5]}
    evaluation = [{"dataset": "gsm8k", "accepted_length": 2.5}]
    facts = {"steps": steps, "tokens": 100 * steps, "hours": hours, "evaluation": evaluation}
    return {"recipe": {"algorithm": "dspark"}, "facts": facts, "history": [point], "earlier": [], **more}


def start_from(directory: Path, content: str, part: Any = "all") -> WarmStartConfig:
    directory.mkdir()
    (directory / "training.json").write_text(content)
    return WarmStartConfig(path=str(directory), part=part)


def test_runs_add_up_from_start_to_start(tmp_path: Path) -> None:
    assert earlier_runs(None) == []
    first = earlier_runs(start_from(tmp_path / "a", json.dumps(made(30, 0.5)), "backbone"))
    both = earlier_runs(start_from(tmp_path / "b", json.dumps(made(70, 1.0, earlier=first))))
    assert [(run["steps"], run["part"], run["algorithm"]) for run in both] == [
        (30, "backbone", "dspark"),
        (70, "all", "dspark"),
    ]
    assert told([]) == ""
    assert "1 run, 30 steps, 3,000 target tokens, 0.50 hours" in told(first)
    assert "2 runs, 100 steps, 10,000 target tokens, 1.50 hours" in told(both)
    rows = rows_of(made(10, 0.25, earlier=both))
    assert [row["run"] for row in rows] == [3, 1, 2, 3]
    assert [row["tokens"] for row in rows] == [11_000, 1_800, 3_000 + 4_200, 10_000 + 600]
    assert [row["hours"] for row in rows] == pytest.approx([1.75, 0.25, 0.5 + 0.5, 1.5 + 0.125])


def test_a_drafter_that_does_not_say_how_it_was_made_has_no_earlier_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "silent").mkdir()
    assert earlier_runs(WarmStartConfig(path=str(tmp_path / "silent"))) == []
    for number, content in enumerate(("?", "[]", "{}", '{"facts": {"steps": 1}}')):
        with caplog.at_level(logging.WARNING):
            assert earlier_runs(start_from(tmp_path / str(number), content)) == []
        assert f"{number}/training.json is not of this project's form" in caplog.text
