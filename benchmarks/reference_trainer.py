"""A plain DSpark trainer to compare costs with: what DeepSpec does, written straightforwardly.

Features of every token are cached in bfloat16 before the first step, and a step holds the whole vocabulary for draft
and target. The drafter's network, the anchors and the data are the ones of dspark_training.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from dspark_training.batches import pools
from dspark_training.config import RunConfig
from dspark_training.data.blocks import Blocks, Sequences, cut_blocks, pad
from dspark_training.data.store import Sample
from dspark_training.models.backbone import BlockDrafter
from dspark_training.models.setup import feature_scale, new_drafter
from dspark_training.target import Target
from torch import Tensor, nn


class Bfloat16Cache:
    """One file a sample: the captured layers and the last hidden state of every token in bfloat16, ids and masks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.bytes, self.tokens = 0, 0
        directory.mkdir(parents=True, exist_ok=True)

    def fill(self, target: Target, samples: list[Sample], layer_ids: tuple[int, ...]) -> None:
        for sample in samples:
            sequences = pad([sample])
            context_BTM, last_BTD = target.features(sequences.ids_BT, sequences.mask_BT, layer_ids)
            features = torch.cat([context_BTM, last_BTD], -1)[0].bfloat16()
            path = self._directory / f"{sample.key}.pt"
            torch.save((features, sequences.ids_BT[0].int(), sequences.supervised_BT[0]), path)
            self.bytes += path.stat().st_size
            self.tokens += len(sample.ids)

    def read(self, sequences: Sequences, width: int) -> tuple[Tensor, Tensor]:
        """Context [B, T, M] and last hidden states [B, T, D] in fp32."""
        rows = [torch.load(self._directory / f"{key}.pt", weights_only=True)[0].float() for key in sequences.keys]
        features_BTF = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return features_BTF[..., :-width], features_BTF[..., -width:]


def full_vocabulary_loss(
    drafter: BlockDrafter, target: Target, context_BTM: Tensor, last_BTD: Tensor, blocks: Blocks, config: RunConfig
) -> Tensor:
    """DSpark's objective by its formula: logits of draft and target over the whole vocabulary at once."""
    head_VD, optim = target.lm_head_weight_VD.float(), config.optim
    out = drafter(context_BTM, blocks.anchors_BA, blocks.previous_BAK, target.embed)
    logits_BAKV = target.soft_cap(out.hidden_BAKD @ head_VD.T)
    if drafter.markov_head is not None:
        latent = drafter.markov_head.latent(out.hidden_BAKD, blocks.previous_BAK)
        logits_BAKV = logits_BAKV + latent @ drafter.markov_head.markov_w2.weight.T
    positions = blocks.anchors_BA[..., None] + torch.arange(blocks.labels_BAK.shape[-1])
    batch = torch.arange(len(positions))[:, None, None]
    with torch.no_grad():
        wanted = last_BTD[batch, positions.clamp_max(last_BTD.shape[1] - 1)]
        target_BAKV = torch.softmax(target.soft_cap(wanted @ head_VD.T), -1)
    weights_BAK = torch.exp(-torch.arange(positions.shape[-1]) / optim.position_decay) * blocks.valid_BAK
    weights_BAK = weights_BAK / weights_BAK.sum()
    ce_BAK = F.cross_entropy(logits_BAKV.flatten(0, 2), blocks.labels_BAK.flatten(), reduction="none").view_as(
        weights_BAK
    )
    l1_BAK = (logits_BAKV.softmax(-1) - target_BAKV).abs().sum(-1)
    total = (weights_BAK * (optim.ce_weight * ce_BAK + optim.l1_weight * l1_BAK)).sum()
    if out.confidence_BAK is not None:
        accepted_BAK = (1 - 0.5 * l1_BAK.detach()).clamp(0, 1)
        told = F.binary_cross_entropy_with_logits(out.confidence_BAK, accepted_BAK, reduction="none")
        total = total + optim.confidence_weight * (weights_BAK * told).sum()
    return total


def train(config: RunConfig, target: Target, samples: list[Sample], directory: Path) -> dict[str, float]:
    """Fill the cache, train, and tell what it took."""
    layers, width = config.drafter.target_layer_ids, target.config.hidden_size
    cache = Bfloat16Cache(directory)
    started = time.monotonic()
    cache.fill(target, samples, layers)
    filled = time.monotonic() - started
    scale_M = feature_scale(target, samples[:16], layers)
    drafter = new_drafter(target, config.drafter, "dspark", config.seed)
    if not isinstance(drafter, BlockDrafter):
        raise TypeError(type(drafter).__name__)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=config.optim.learning_rate, betas=(0.9, 0.95))
    order = samples[:]
    random.Random(config.seed).shuffle(order)
    started, step, tokens = time.monotonic(), 0, 0
    for pool in pools(order, config.optim, config.seed, 0):
        tokens += pool.tokens
        for draws in pool.steps:
            context_BTM, last_BTD = cache.read(draws[0].sequences, width)
            blocks = cut_blocks(draws[0].sequences, draws[0].anchors_BA, config.drafter.block_size)
            loss = full_vocabulary_loss(drafter, target, context_BTM * scale_M, last_BTD, blocks, config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(drafter.parameters(), config.optim.clip_norm)
            optimizer.step()
            step += 1
        if step >= config.optim.steps:
            break
    return {
        "seconds": time.monotonic() - started,
        "preparation_seconds": filled,
        "steps": step,
        "tokens": tokens,
        "disk_bytes_per_token": cache.bytes / cache.tokens,
    }
