"""How a drafter is optimised: optimizers and their parameter groups, the learning rate of a step, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dspark_training.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(optim.steps * optim.warmup_share))
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, optim.steps - warmup)
    return optim.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizers(drafter: nn.Module, optim: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon for the matrices of `fc` and the draft layers and AdamW for the rest.

    Muon's updates are scaled to AdamW's size ("match_rms_adamw"), so one learning rate serves both. The Markov head's
    tables get `markov_lr_scale` times the learning rate (group key `lr_scale`).
    """
    named = list(drafter.named_parameters())
    markov = [p for name, p in named if name.startswith("markov_head.")]
    matrices = [p for name, p in named if optim.optimizer == "muon" and _is_inner_matrix(name, p)]
    taken = {id(p) for p in markov + matrices}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [{"params": rest, "lr_scale": 1.0}, {"params": markov, "lr_scale": optim.markov_lr_scale}]
    groups = [group for group in groups if group["params"]]
    rate, decay = optim.learning_rate, optim.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    ]
    if matrices:
        inner = [{"params": matrices, "lr_scale": 1.0}]
        optimizers.append(torch.optim.Muon(inner, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and name.startswith(("fc.", "layers."))


class AveragedWeights:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 1); early averages forget faster."""
        decay = min(self._decay, step / (step + 10))
        for name, parameter in self._module.named_parameters():
            self.average[name].lerp_(parameter, 1 - decay)

    def keep(self) -> None:
        """Give the module the averaged weights for good."""
        _load(self._module, self.average)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module has the averaged weights."""
        current = {name: p.detach().clone() for name, p in self._module.named_parameters()}
        _load(self._module, self.average)
        try:
            yield
        finally:
            _load(self._module, current)


@torch.no_grad()
def _load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(weights[name])
