"""Safetensors files, opened without trusting them: size of the header first, then the header, then the tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dspark_serving.drafters.spec import read_json_object
from dspark_serving.errors import CheckpointError

INDEX = "model.safetensors.index.json"
# The header of a checkpoint of a thousand weights takes a tenth of a megabyte; safetensors' own limit is the same.
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or those that its index names.

    Raises:
        CheckpointError: there are none, the index is damaged or points out of the directory; says so when the weights
            are there in a format that can run code.
    """
    index = directory / INDEX
    names = ["model.safetensors"]
    if index.is_file():
        named = read_json_object(index, "an index of safetensors files").get("weight_map")
        if not isinstance(named, dict) or not named or not all(_plain(name) for name in named.values()):
            raise CheckpointError(
                f"{index}: weight_map does not name safetensors files beside it",
                expected="a file name for each weight",
                fix="Copy the checkpoint again.",
            )
        names = sorted(set(named.values()))
    absent = [name for name in names if not (directory / name).is_file()]
    if not absent:
        return [directory / name for name in names]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))
    raise CheckpointError(
        f"{directory / absent[0]} does not exist"
        + (f", only pickled weights ({', '.join(pickled)})" if pickled else ""),
        expected="weights as safetensors; pickled ones can run code and are never loaded",
        fix="Convert the weights to safetensors." if pickled else "Copy the checkpoint again.",
    )


def open_weights(path: Path) -> safe_open:
    """Open a safetensors file; its header is checked against the file's size.

    Raises:
        CheckpointError: the file is truncated, or its header is damaged or absurdly long.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES or length + _LENGTH_BYTES > path.stat().st_size:
            raise _damaged(path, f"its header claims {length} bytes of {path.stat().st_size}")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error


def tensor(file: safe_open, path: Path, name: str) -> torch.Tensor:
    """One weight of the open file `path`.

    Raises:
        CheckpointError: its type is none that torch knows.
    """
    try:
        return file.get_tensor(name)
    except (SafetensorError, ValueError, TypeError) as error:
        raise _damaged(path, f"{name}: {error}") from error


def weight_names(directory: Path) -> frozenset[str]:
    """The names of all weights of a checkpoint, from the headers.

    Raises:
        CheckpointError: as `weight_files` and `open_weights`.
    """
    names: set[str] = set()
    for path in weight_files(directory):
        with open_weights(path) as file:
            names.update(file.keys())
    return frozenset(names)


def read_weight(directory: Path, name: str) -> torch.Tensor:
    """One weight of a checkpoint.

    Raises:
        CheckpointError: as `weight_files` and `open_weights`, or no file holds it.
    """
    for path in weight_files(directory):
        with open_weights(path) as file:
            if name in file.keys():  # noqa: SIM118
                return tensor(file, path, name)
    raise CheckpointError(
        f"{directory} lacks the weight {name}",
        expected="every weight that its config.json calls for",
        fix="Export or copy the drafter again.",
    )


def _plain(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({reason})", expected="a complete safetensors file", fix="Copy the checkpoint again."
    )
