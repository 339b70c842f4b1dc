"""Starting a drafter from a checkpoint of any format that serving reads, of its own family or another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dspark_serving.drafters import DrafterSpec, check_fit, check_weights, read_spec
from dspark_serving.drafters.weights import weights_of
from dspark_serving.errors import CheckpointError
from dspark_training.models.setup import Drafter
from dspark_training.target import Target

log = logging.getLogger(__name__)

Parts = Literal["all", "heads", "backbone"]

_HEADS = ("markov_head.", "confidence_head.")
_W2 = "markov_head.markov_w2.weight"


class WarmStart(NamedTuple):
    """What became of the drafter's weights, by name."""

    taken: tuple[str, ...]
    left: tuple[str, ...]  # as they were: not asked for, not in the file, or of another shape there


@torch.no_grad()
def warm_start(
    drafter: Drafter, target: Target, layer_ids: tuple[int, ...], scale_M: Tensor, path: Path, parts: Parts = "all"
) -> WarmStart:
    """Copy every weight that has the same name and shape in the checkpoint.

    A reduced vocabulary's Markov rows go to the rows of their tokens. A checkpoint from a block whose anchor predicts
    nothing (z-lab's DFlash) is a start like any other: the roles of its rows have to be learnt anew.

    Args:
        layer_ids: target layers that the drafter reads.
        scale_M: feature scale of this training; the checkpoint's `fc` takes features as the target gives them.
        path: directory of a drafter in any format that serving reads.
        parts: all weights, those of the Markov and confidence heads, or all but those.

    Raises:
        CheckpointError: the checkpoint cannot be read, was made for another target or, unless only heads are taken,
            reads other feature layers; or no weight fits.
    """
    spec = start_spec(target, layer_ids, path, parts)
    found, weights = _weights(spec, scale_M), drafter.state_dict()
    fitting = [name for name in weights if _asked(name, parts) and _fits(name, weights[name], found, spec)]
    if not fitting:
        raise CheckpointError(
            f"no weight of the drafter {path} ({spec.family}) fits ({'; '.join(_differences(weights, found, parts))})",
            expected="weights of the same names and shapes",
            fix="Give the drafter the checkpoint's sizes, take other parts of it, or start anew.",
        )
    for name in fitting:
        rows = _token_rows(spec) if weights[name].shape != found[name].shape else slice(None)
        weights[name][rows] = found[name].to(weights[name])  # state_dict shares memory with the parameters
    taken = tuple(fitting)
    left = tuple(name for name in weights if name not in taken)
    log.info("%d weights start from %s, %d do not: %s", len(taken), path, len(left), ", ".join(left) or "none")
    return WarmStart(taken, left)


def start_spec(target: Target, layer_ids: tuple[int, ...], path: Path, parts: Parts) -> DrafterSpec:
    """What stands at `path`, fit to start from; no weight is read.

    Raises:
        CheckpointError: see `warm_start`.
    """
    spec = check_fit(read_spec(path), target.config.to_dict(), Path(target.model.name_or_path))
    if parts != "heads" and spec.target_layer_ids != tuple(layer_ids):
        raise CheckpointError(
            f"the drafter {path} reads the target's layers {list(spec.target_layer_ids)}",
            expected=f"the layers that this run reads, {list(layer_ids)}",
            fix="Set drafter.target_layer_ids to the checkpoint's, or take only its heads.",
        )
    check_weights(spec)
    return spec


def _weights(spec: DrafterSpec, scale_M: Tensor) -> dict[str, Tensor]:
    weights = weights_of(spec)
    fc_DM = weights["fc.weight"].float()
    if fc_DM.shape[1] == len(scale_M):
        weights["fc.weight"] = fc_DM / scale_M.cpu()
    return weights


def _asked(name: str, parts: Parts) -> bool:
    return parts == "all" or name.startswith(_HEADS) == (parts == "heads")


def _fits(name: str, weight: Tensor, found: dict[str, Tensor], spec: DrafterSpec) -> bool:
    if name not in found:
        return False
    if name == _W2 and spec.head_rows != spec.vocab_size:
        return found[name].shape[1:] == weight.shape[1:]
    return found[name].shape == weight.shape


def _token_rows(spec: DrafterSpec) -> Tensor:
    """Ids of the tokens that the rows of a reduced markov_w2 stand for."""
    return torch.tensor(spec.draft_token_ids or range(spec.vocab_size))


def _differences(weights: dict[str, Tensor], found: dict[str, Tensor], parts: Parts) -> list[str]:
    """The first few reasons."""
    asked = [name for name in weights if _asked(name, parts)]
    if not asked:
        return [f"the drafter to train has no {parts}"]
    shapes = [
        f"{name} is {list(found[name].shape)}, not {list(weights[name].shape)}" for name in asked if name in found
    ]
    return (shapes or [f"it has no {name}" for name in asked])[:3]
