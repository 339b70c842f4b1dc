"""The log of a run: one JSON object a validation, and TensorBoard if it is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspark_serving.errors import EnvironmentMismatchError
from dspark_training.data.jsonl import append_rows
from dspark_training.disk import replace_text


class RunLog:
    """Appends rows to `log.jsonl` under `output`, and their numbers to `tensorboard/`.

    Args:
        history: rows up to where the run resumes; what a killed process logged behind them will be logged again.

    Raises:
        EnvironmentMismatchError: TensorBoard is asked for and not installed.
        DataError: the log cannot be written.
    """

    def __init__(self, output: Path, tensorboard: bool, history: Sequence[dict[str, Any]] = ()) -> None:
        self._path = output / "log.jsonl"
        replace_text(self._path, "".join(json.dumps(row) + "\n" for row in history))
        next_step = history[-1]["step"] + 1 if history else 0
        self._board: Any = _writer(output / "tensorboard", next_step) if tensorboard else None

    def add(self, row: dict[str, Any]) -> None:
        """Write a row with a `step`.

        Raises:
            DataError: it cannot be written.
        """
        append_rows(self._path, [row])
        if self._board is None:
            return
        for key, value in row.items():
            if isinstance(value, int | float):
                self._board.add_scalar(key, value, row["step"])
            elif isinstance(value, list):
                for i, part in enumerate(value, start=1):
                    self._board.add_scalar(f"{key}/{i}", part, row["step"])
        self._board.flush()


def _writer(directory: Path, next_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise EnvironmentMismatchError(
            "tensorboard is asked for and not installed",
            expected="tensorboard beside torch",
            fix="Run `pip install 'dspark-serving[train]'`, or set tensorboard=false.",
        ) from None
    return SummaryWriter(str(directory), purge_step=next_step)
