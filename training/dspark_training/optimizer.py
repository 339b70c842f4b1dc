"""How a drafter is optimised: parameter groups and the learning rate of a step."""

from __future__ import annotations

import math

import torch
from torch import nn

from dspark_training.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(optim.steps * optim.warmup_share))
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, optim.steps - warmup)
    return optim.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(drafter: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW; the Markov head's tables get `markov_lr_scale` times the learning rate (group key `lr_scale`)."""
    markov = [p for name, p in drafter.named_parameters() if name.startswith("markov_head.")]
    rest = [p for name, p in drafter.named_parameters() if not name.startswith("markov_head.")]
    groups = [{"params": rest, "lr_scale": 1.0}, {"params": markov, "lr_scale": optim.markov_lr_scale}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(
        groups, lr=optim.learning_rate, betas=(0.9, 0.95), weight_decay=optim.weight_decay, fused=True
    )
