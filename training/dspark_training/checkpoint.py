"""Checkpoints of a run: tensors in safetensors, the rest in JSON, complete or absent whatever kills the process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dspark_serving.errors import CheckpointError
from dspark_training.disk import writing

_MODEL, _OPTIMIZER, _AVERAGE, _STATE = "model.safetensors", "optimizer.safetensors", "average.safetensors", "state.json"

Optimizers = Sequence[torch.optim.Optimizer]


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizers: Optimizers,
    state: dict[str, Any],
    average: dict[str, Tensor] | None = None,
) -> Path:
    """Write `root/step-N` under a temporary name, move it into place, then drop older ones.

    A step that is there already is left alone: a run reaches each step with one content only.

    Raises:
        CheckpointError: it cannot be written; older ones are intact.
    """
    final = root / f"step-{step:07d}"
    if final.exists():
        return final
    partial = root / f".partial-{step:07d}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(f"the checkpoint {final}", CheckpointError):
            partial.mkdir(parents=True)
            save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, partial / _MODEL)
            save_file(_flatten(optimizers), partial / _OPTIMIZER)
            if average is not None:
                save_file({k: v.cpu() for k, v in average.items()}, partial / _AVERAGE)
            (partial / _STATE).write_text(json.dumps({"step": step, **state}, indent=1))
            os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for older in root.glob("step-*"):
        if older != final:
            shutil.rmtree(older)
    return final


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`."""
    return max(root.glob("step-*"), default=None)


def restore(
    path: Path, model: nn.Module, optimizers: Optimizers, average: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """Load a checkpoint into model, optimizers and averaged weights; returns its state.

    Raises:
        CheckpointError: it belongs to another shape of drafter or another way to optimise.
    """
    tensors = load_file(path / _OPTIMIZER)
    try:
        model.load_state_dict(load_file(path / _MODEL))
        for name, parameter in _named_parameters(optimizers):
            keys = [k for k in tensors if k.rpartition("/")[0] == name]
            optimizer = optimizers[int(name.partition(".")[0])]
            optimizer.state[parameter] = {k.rpartition("/")[2]: tensors[k].to(parameter.device) for k in keys}
        known = {name for name, _ in _named_parameters(optimizers)}
        if any(k.rpartition("/")[0] not in known for k in tensors):
            raise RuntimeError("other optimizers")
        if average is not None:
            for name, tensor in load_file(path / _AVERAGE).items():
                average[name].copy_(tensor)
    except (RuntimeError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{path} was written by another configuration ({str(error).splitlines()[0]})",
            expected="a checkpoint of this very recipe",
            fix="Choose another --work directory, or delete this one.",
        ) from None
    return json.loads((path / _STATE).read_text())


def save_weights(path: Path, model: nn.Module) -> None:
    """Weights alone, in one file that is complete or as it was before.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = path.with_name(f".partial-{path.name}")
    with writing(f"the weights {path}", CheckpointError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, partial)
        os.replace(partial, path)


def load_weights(path: Path, model: nn.Module) -> None:
    """The inverse of `save_weights`."""
    model.load_state_dict(load_file(path))


def _flatten(optimizers: Optimizers) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": torch.as_tensor(value).cpu().contiguous()
        for name, parameter in _named_parameters(optimizers)
        for key, value in optimizers[int(name.partition(".")[0])].state[parameter].items()
    }


def _named_parameters(optimizers: Optimizers) -> list[tuple[str, nn.Parameter]]:
    """Parameters by their place in the optimizers' groups, which the configuration fixes."""
    return [
        (f"{o}.{g}.{i}", parameter)
        for o, optimizer in enumerate(optimizers)
        for g, group in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(group["params"])
    ]
