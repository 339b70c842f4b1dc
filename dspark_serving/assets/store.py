"""Directories in the cache that are either complete and described by a manifest, or absent."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import filelock
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from dspark_serving.errors import EnvironmentMismatchError

MANIFEST = "manifest.json"
_LOCK_SECONDS = 1800.0  # far more than the slowest build: a lock held for longer means a process that hangs

Report = Callable[[str], None]  # told, in a line, what happens next


class FileRecord(BaseModel):
    """What a file has to be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """The files of a finished directory and the recipe that they were made by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str  # names sources and builder: a directory made by another recipe is built again
    files: dict[str, FileRecord]


def cache_root() -> Path:
    """Where assets are kept: $DSPARK_CACHE, else ~/.cache/dspark."""
    return Path(os.environ.get("DSPARK_CACHE") or Path.home() / ".cache" / "dspark")


def checkpoint_name(path: str | Path) -> str:
    """A checkpoint's own name; those in the cache lie in a directory named after their dtype."""
    last = Path(path)
    return last.parent.name if last.name in ("bf16", "fp32") else last.name


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(directory: Path, recipe: str, *, check_hashes: bool) -> str | None:
    """What is wrong with a directory, or None.

    Sizes are always compared; contents only with `check_hashes` (about a second a gigabyte).
    """
    try:
        manifest = Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except ValidationError:
        return f"its {MANIFEST} cannot be read"
    if manifest.recipe != recipe:
        return f"it was made by '{manifest.recipe}', not by '{recipe}'"
    for name, record in manifest.files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != record.bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {record.bytes}"
        if check_hashes and sha256_of(path) != record.sha256:
            return f"the contents of {name} do not match its checksum"
    return None


def ensure(
    directory: Path,
    recipe: str,
    build: Callable[[Path], None],
    *,
    needs_bytes: int,
    report: Report,
    check_hashes: bool = False,
) -> Path:
    """Return a directory that matches its manifest, building it first where it is absent or damaged.

    `build` fills an empty directory beside the final one, which is renamed into place when it is complete: a build that
    is interrupted, by a signal or an error, leaves what was there before. Only one process builds; others wait for it.

    Raises:
        EnvironmentMismatchError: the disk is full or read-only, or another process holds the lock for half an hour.
    """
    try:
        if damage(directory, recipe, check_hashes=check_hashes) is None:
            return directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(directory.with_name(f".{directory.name}.lock"), timeout=_LOCK_SECONDS):
            found = damage(directory, recipe, check_hashes=check_hashes)  # another process may have built it meanwhile
            if found is None:
                return directory
            if directory.exists():
                report(f"{directory} cannot be used as it is ({found}): making it again")
            _require_disk(directory.parent, needs_bytes)
            _build_and_publish(directory, recipe, build)
    except filelock.Timeout as error:
        raise EnvironmentMismatchError(
            f"another process has been working on {directory} for {_LOCK_SECONDS / 60:.0f} minutes",
            expected="it to finish",
            fix=f"End that process if it hangs; it holds {error.lock_file}.",
        ) from error
    except (OSError, SafetensorError) as error:
        raise EnvironmentMismatchError(
            f"{directory} cannot be written ({error})",
            expected=f"a writable disk with {needs_bytes / 1e9:.1f} GB free",
            fix="Free some space, or set DSPARK_CACHE to a directory elsewhere.",
        ) from error
    return directory


def _require_disk(directory: Path, needs_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needs_bytes:
        raise EnvironmentMismatchError(
            f"{free / 1e9:.1f} GB of disk free in {directory}",
            expected=f"{needs_bytes / 1e9:.1f} GB",
            fix="Free some space, or set DSPARK_CACHE to a directory elsewhere.",
        )


def _build_and_publish(directory: Path, recipe: str, build: Callable[[Path], None]) -> None:
    staging = directory.with_name(f".{directory.name}.partial")
    replaced = directory.with_name(f".{directory.name}.replaced")
    # A process that was killed could not tidy up; nobody else is in here while this one holds the lock.
    shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    staging.mkdir()
    try:
        build(staging)
        _write_manifest(staging, recipe)
        if directory.exists():
            directory.rename(replaced)
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _write_manifest(directory: Path, recipe: str) -> None:
    """Record and make readable every file; the manifest itself is flushed to disk before the directory is renamed."""
    records = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        path.chmod(0o644)  # safetensors writes files that only their owner can read
        records[str(path.relative_to(directory))] = FileRecord(sha256=sha256_of(path), bytes=path.stat().st_size)
    with (directory / MANIFEST).open("w") as file:
        file.write(Manifest(recipe=recipe, files=records).model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
