"""Writes that fail (a full disk, no permission) as errors that say so, and files that are whole or as they were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dspark_serving.errors import DataError, DsparkError


@contextmanager
def writing(what: str | Path, error_type: type[DsparkError] = DataError) -> Iterator[None]:
    """Write `what` inside, so that what was there before is unchanged when that fails.

    Raises:
        DsparkError: of `error_type`, when it cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise error_type(
            f"{what} cannot be written ({reason})",
            expected="a writable place with room for it; what was there before is unchanged",
            fix="Free some space and run it again, or choose another directory.",
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Write a text file: complete, or as it was before.

    Raises:
        DataError: it cannot be written.
    """
    partial = path.with_name(f".partial-{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
