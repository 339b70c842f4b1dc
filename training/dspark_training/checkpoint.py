"""Checkpoints of a run: tensors in safetensors, the rest in JSON, complete or absent whatever kills the process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dspark_serving.errors import CheckpointError

_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def save(root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write `root/step-N` under a temporary name, move it into place, then drop older ones."""
    final = root / f"step-{step:07d}"
    partial = root / f".partial-{step:07d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial / _MODEL)
    save_file(_flatten(optimizer), partial / _OPTIMIZER)
    (partial / _STATE).write_text(json.dumps({"step": step, **state}, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for older in root.glob("step-*"):
        if older != final:
            shutil.rmtree(older)
    return final


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`."""
    return max(root.glob("step-*"), default=None)


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint into model and optimizer; returns its state.

    Raises:
        CheckpointError: the weights belong to another shape of drafter.
    """
    try:
        model.load_state_dict(load_file(path / _MODEL))
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} was written by another configuration ({str(error).splitlines()[0]})",
            expected="a checkpoint of this very recipe",
            fix="Choose another --output directory, or delete this one.",
        ) from None
    tensors = load_file(path / _OPTIMIZER)
    for name, parameter in _named_parameters(optimizer):
        keys = [k for k in tensors if k.rpartition("/")[0] == name]
        optimizer.state[parameter] = {k.rpartition("/")[2]: tensors[k] for k in keys}
    return json.loads((path / _STATE).read_text())


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": torch.as_tensor(value).contiguous()
        for name, parameter in _named_parameters(optimizer)
        for key, value in optimizer.state[parameter].items()
    }


def _named_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Parameters by their place in the groups, which the configuration fixes."""
    return [
        (f"{g}.{i}", parameter)
        for g, group in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(group["params"])
    ]
