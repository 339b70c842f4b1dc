"""The log of a run: one JSON object a validation, and TensorBoard if it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dspark_serving.errors import EnvironmentMismatchError


class RunLog:
    """Appends rows to `log.jsonl` under `output`, and their numbers to `tensorboard/`.

    Raises:
        EnvironmentMismatchError: TensorBoard is asked for and not installed.
    """

    def __init__(self, output: Path, tensorboard: bool) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self._path = output / "log.jsonl"
        self._board: Any = _writer(output / "tensorboard") if tensorboard else None

    def add(self, row: dict[str, Any]) -> None:
        """Write a row with a `step`."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is None:
            return
        for key, value in row.items():
            if isinstance(value, int | float):
                self._board.add_scalar(key, value, row["step"])
            elif isinstance(value, list):
                for i, part in enumerate(value, start=1):
                    self._board.add_scalar(f"{key}/{i}", part, row["step"])
        self._board.flush()


def _writer(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise EnvironmentMismatchError(
            "tensorboard is asked for and not installed",
            expected="tensorboard beside torch",
            fix="Run `pip install 'dspark-serving[train]'`, or set tensorboard=false.",
        ) from None
    return SummaryWriter(str(directory))
