"""The log of a run without TensorBoard at hand."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dspark_training.runlog import RunLog

from dspark_serving.errors import EnvironmentMismatchError


def test_missing_tensorboard_is_installed_by_what_the_error_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    RunLog(tmp_path, tensorboard=False)
    with pytest.raises(EnvironmentMismatchError, match="tensorboard is asked for and not installed") as caught:
        RunLog(tmp_path, tensorboard=True)
    assert "pip install 'dspark-serving[train]'" in caught.value.fix
    extra = re.search(r'"train": \[(.*)\]', (Path(__file__).parents[1] / "setup.py").read_text())
    assert extra is not None
    assert '"tensorboard"' in extra[1]


def test_a_resumed_run_takes_back_what_it_will_show_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, Any]] = []
    board = SimpleNamespace(SummaryWriter=lambda directory, **options: opened.append(options))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    RunLog(tmp_path, tensorboard=True)
    RunLog(tmp_path, tensorboard=True, history=[{"step": 5}, {"step": 10}])
    assert opened == [{"purge_step": 0}, {"purge_step": 11}]
