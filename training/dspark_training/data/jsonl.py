"""JSONL files that grow: what was written stays, whatever happens in mid-write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dspark_serving.errors import DataError
from dspark_training.data.conversation import RowError


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(`file:line`, decoded row) for each line that is not blank; a RowError as the row where it is no JSON.

    Raises:
        DataError: the file does not exist.
    """
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", expected="a JSONL file", fix="Check the path.") from None
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError:
                yield f"{path}:{number}", RowError("no JSON")


def append_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write rows behind those that are there.

    Raises:
        DataError: the disk is full; what was there before stays.
    """
    lines = "".join(json.dumps(row, default=str) + "\n" for row in rows)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        drop_torn_line(path)
        raise DataError(
            f"{path} cannot be written ({error.strerror})",
            expected="space on the disk",
            fix="Free some and run the same command again: it goes on behind what was written.",
        ) from error


def drop_torn_line(path: Path) -> None:
    """A kill in mid-write leaves half a line at the end: cut it off."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        tail = b""
        while end and b"\n" not in tail:
            start = max(0, end - 65536)
            file.seek(start)
            tail, end = file.read(end - start), start
        if not tail.endswith(b"\n"):
            file.truncate(end + tail.rfind(b"\n") + 1)
