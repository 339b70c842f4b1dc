"""Profiled step times on disk, one file for each machine, model and engine they hold for."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from dspark_serving.errors import DataError
from dspark_serving.scheduler.cost import CostModel, CostSample

FORMAT_VERSION = 3
COST_DIRECTORY = "cost"  # of the cache, and of a bundle that carries tables
FIX = "Delete the file; the next start of the server measures again."


class CostKey(BaseModel):
    """Everything that step times depend on; a table is used only where all of it agrees."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    device: str
    model: str
    drafter: str
    dtype: str
    tp_size: int = Field(ge=1)
    attention_backend: str
    threads: int = Field(ge=1)
    gamma: int = Field(ge=1, description="drafted tokens a block")
    tiers: tuple[PositiveInt, ...] | None = Field(description="captured token totals, ascending; None: eager")
    sglang: str
    plugin: str

    @property
    def file_name(self) -> str:
        """Of the table that holds for this key."""
        return f"cost-{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]}.json"


class _CostFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["dspark-cost"] = "dspark-cost"
    version: int = FORMAT_VERSION
    key: CostKey
    samples: tuple[CostSample, ...]


def checkpoint_identity(checkpoint: Path) -> str:
    """What a checkpoint is to step times, wherever it lies: its config.json and the size of its weights."""
    config = checkpoint / "config.json"
    text = config.read_bytes() if config.is_file() else b""
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    return f"{hashlib.sha256(text).hexdigest()[:16]}:{size}"


def tables_of(directory: Path, drafter: str) -> list[Path]:
    """The tables in a directory that were measured with this drafter (`CostKey.drafter`); damaged ones are skipped."""
    found = []
    for path in sorted(directory.glob("cost-*.json")):
        try:
            content = _CostFile.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        if content.version == FORMAT_VERSION and content.key.drafter == drafter:
            found.append(path)
    return found


def save_cost(directory: Path, key: CostKey, model: CostModel) -> Path:
    """Write what `model` was fitted to (what it learned online stays with the process); replaces the file at once.

    Raises:
        DataError: the model knows nothing, or it does not fit the key's block size or captured totals.
    """
    _check_block_size(model.samples, key, "the cost model to save")
    if model.tiers != key.tiers:
        raise DataError(
            f"a cost model for graphs of {model.tiers} tokens",
            expected=f"graphs of {key.tiers}",
            fix="Mend the caller.",
        )
    if not model.known:
        raise DataError("a cost model without data", expected="one fitted to samples", fix="Measure the engine first.")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / key.file_name
    content = _CostFile(key=key, samples=model.samples).model_dump_json(indent=1)
    with tempfile.NamedTemporaryFile("w", dir=directory, prefix=path.stem, suffix=".part", delete=False) as part:
        part.write(content)
    os.replace(part.name, path)
    return path


def load_cost(directory: Path, key: CostKey) -> CostModel | None:
    """The model saved for exactly this key; None when there is none.

    Raises:
        DataError: the file is damaged, of another version, of another key, or holds impossible times.
    """
    path = directory / key.file_name
    try:
        content = _CostFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read cost table {path}: {error}", expected="a readable file", fix=FIX) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"damaged cost table {path} ({place}: {first['msg']})", expected="a table as saved", fix=FIX
        ) from error
    if content.version != FORMAT_VERSION:
        raise DataError(
            f"cost table {path} has version {content.version}", expected=f"version {FORMAT_VERSION}", fix=FIX
        )
    _check_key(path, content.key, key)
    _check_block_size(content.samples, key, f"cost table {path}")
    return CostModel.fit(content.samples, key.tiers)


def _check_key(path: Path, found: CostKey, wanted: CostKey) -> None:
    differing = [name for name in CostKey.model_fields if getattr(found, name) != getattr(wanted, name)]
    if differing:
        raise DataError(
            f"cost table {path} holds for " + ", ".join(f"{name} {getattr(found, name)!r}" for name in differing),
            expected=", ".join(f"{name} {getattr(wanted, name)!r}" for name in differing),
            fix=FIX,
        )


def _check_block_size(samples: tuple[CostSample, ...], key: CostKey, where: str) -> None:
    for sample in samples:
        if sample.tokens > sample.requests * (key.gamma + 1):
            raise DataError(
                f"{where} has a round of {sample.tokens} tokens for {sample.requests} requests",
                expected=f"at most {key.gamma + 1} a request (block size {key.gamma})",
                fix=FIX,
            )
