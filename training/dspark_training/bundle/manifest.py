"""manifest.json of a bundle: size and SHA-256 of every file, so that a damaged or exchanged one is named."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dspark_serving.errors import CheckpointError

MANIFEST = "manifest.json"
DRAFTER_FILES = ("config.json", "model.safetensors", "draft_vocab.json")
_FIX = "Copy the bundle again, or make it again."


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["dspark-bundle"] = "dspark-bundle"
    version: Literal[1] = 1
    files: dict[str, _Entry]


def write_manifest(directory: Path) -> None:
    """Describe every file of a directory as it is now."""
    entries = {name: _Entry(bytes=path.stat().st_size, sha256=_sha256(path)) for name, path in _files(directory)}
    (directory / MANIFEST).write_text(_Manifest(files=entries).model_dump_json(indent=2) + "\n")


def manifest_problems(directory: Path) -> list[str]:
    """Every way in which the files differ from the manifest, files that it does not name included; empty when none.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    entries = _read(directory)
    problems = [problem for name, entry in entries.items() for problem in _file_problems(directory, name, entry)]
    return problems + [f"{name} is not in {MANIFEST}" for name, _ in _files(directory) if name not in entries]


def drafter_problems(directory: Path) -> list[str]:
    """The same of the files that a drafter is made of; what else is in the bundle may have been replaced since.

    Drafters of other formats have no manifest, and no problems.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    if not (directory / MANIFEST).is_file():
        return []
    entries = _read(directory)
    return [
        problem
        for name in DRAFTER_FILES
        if name in entries
        for problem in _file_problems(directory, name, entries[name])
    ]


def check_drafter_files(directory: Path) -> None:
    """Raise CheckpointError with `drafter_problems`, if there are any."""
    _raise_for(directory, drafter_problems(directory))


def check_manifest(directory: Path) -> None:
    """Raise CheckpointError with `manifest_problems`, if there are any."""
    _raise_for(directory, manifest_problems(directory))


def _raise_for(directory: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(
            f"the bundle {directory} is not as it was made: {'; '.join(problems)}",
            expected=f"the files that {MANIFEST} describes",
            fix=_FIX,
        )


def _read(directory: Path) -> dict[str, _Entry]:
    path = directory / MANIFEST
    try:
        found = _Manifest.model_validate_json(path.read_bytes()).files
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise CheckpointError(
            f"{path} cannot be used ({reason})", expected="a manifest of version 1", fix=_FIX
        ) from error
    outside = [name for name in found if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise CheckpointError(f"{path} names {outside[0]!r}", expected="files inside the bundle", fix=_FIX)
    return found


def _file_problems(directory: Path, name: str, entry: _Entry) -> list[str]:
    path = directory / name
    if not path.is_file():
        return [f"{name} is missing"]
    if path.stat().st_size != entry.bytes:
        return [f"{name} has {path.stat().st_size} bytes instead of {entry.bytes}"]
    return [] if _sha256(path) == entry.sha256 else [f"{name} has another content (SHA-256)"]


def _files(directory: Path) -> list[tuple[str, Path]]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return [(path.relative_to(directory).as_posix(), path) for path in paths if path.name != MANIFEST]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
