"""Bundles are written aside and renamed: whatever fails, the directory is the old one or the new one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dspark_serving.errors import CheckpointError, OptionError
from dspark_training.bundle.lineage import PROVENANCE
from dspark_training.bundle.manifest import MANIFEST, write_manifest
from dspark_training.disk import writing


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; on leaving it gets its manifest and takes the place of `directory`.

    Between two renames the old bundle is called `.NAME.old`; a process that is killed just there leaves it by that
    name, and the next one puts it back first.

    Raises:
        OptionError: `directory` holds something else than a bundle.
        CheckpointError: it cannot be written (a full disk, no permission); what was there is intact.
    """
    partial, old = (directory.with_name(f".{directory.name}.{mark}") for mark in ("partial", "old"))
    check_replaceable(directory)
    try:
        with writing(f"the bundle {directory}", CheckpointError):
            if old.exists() and not directory.exists():
                os.replace(old, directory)
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            write_manifest(partial)
            _exchange(partial, directory, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(directory: Path) -> None:
    """Raise OptionError when writing a bundle there would destroy something else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not any((directory / name).is_file() for name in (MANIFEST, PROVENANCE)):
        raise OptionError(
            f"{directory} exists and holds no bundle of this package",
            expected="a new directory, an empty one, or a bundle to replace",
            fix="Choose another directory.",
        )


def _exchange(partial: Path, directory: Path, old: Path) -> None:
    if not directory.exists():
        os.replace(partial, directory)
        return
    os.replace(directory, old)
    try:
        os.replace(partial, directory)
    except OSError:
        os.replace(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
