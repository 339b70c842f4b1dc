"""The training loop: frozen target and drafter in one process, resumable at any step."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dspark_serving.errors import DataError, DsparkError
from dspark_training import checkpoint
from dspark_training.config import RunConfig
from dspark_training.data.blocks import Sequences, cut_blocks, draw_anchors, pad
from dspark_training.data.store import Sample
from dspark_training.data.vocab import DraftVocab
from dspark_training.evaluation.validation import Validation
from dspark_training.features.source import FeatureSource, OnlineFeatures
from dspark_training.models.setup import Drafter, feature_scale, new_drafter
from dspark_training.objectives.build import Objective, build_objective
from dspark_training.objectives.supervision import Supervision, supervise
from dspark_training.optimizer import build_optimizer, learning_rate
from dspark_training.target import Target

log = logging.getLogger(__name__)

_SCALE_SAMPLES = 16


class StepReport(NamedTuple):
    """What a progress bar shows after an optimizer step."""

    step: int
    steps: int
    loss: float
    accepted_length: float  # newest validation, bonus included; nan before the first
    tokens: int  # target tokens run so far
    seconds_left: float


class Batch(NamedTuple):
    """What one optimizer step looks at."""

    supervision: Supervision
    sequences: Sequences
    anchors_BA: torch.Tensor  # -1 where a sequence has no more


class TrainingError(DsparkError):
    """The run cannot go on; the last checkpoint is intact."""


class Trainer:
    """Trains one drafter; construct, then run(). A second run in the same directory resumes."""

    def __init__(self, config: RunConfig, target: Target, samples: list[Sample], output: Path) -> None:
        if len(samples) < 2:
            raise DataError(f"{len(samples)} samples to train on", expected="at least 2", fix="Generate answers first.")
        self.config, self.target, self.output = config, target, output
        held_out = max(1, round(len(samples) * config.data.validation_share))
        ordered = sorted(samples, key=lambda s: s.key)  # by hash: the same split whatever the order of generation
        self.train_samples, self.validation_samples = ordered[held_out:], ordered[:held_out]
        self.vocab, self.coverage = DraftVocab.most_frequent(
            self.train_samples, config.drafter.draft_vocab_size, target.config.vocab_size, target.stop_ids
        )
        self.drafter: Drafter = new_drafter(target, config.drafter, config.algorithm, config.seed)
        self.layer_ids = config.drafter.target_layer_ids
        self.scale_M = feature_scale(target, self.train_samples[:_SCALE_SAMPLES], self.layer_ids)
        self.source: FeatureSource = OnlineFeatures(target, self.layer_ids, self.scale_M)
        self.optimizer = build_optimizer(self.drafter, config.optim)
        self.objective: Objective = build_objective(config.algorithm, self.drafter, target, self.vocab, config.optim)
        self.step, self.forwards, self.tokens, self.seconds = 0, 0, 0, 0.0
        self.history: list[dict] = []

    def run(self, on_step: Callable[[StepReport], None] = lambda report: None) -> None:
        """Train up to config.optim.steps; resumes from the newest checkpoint under the output directory."""
        self._resume()
        optim = self.config.optim
        validation = Validation(self.target, self.validation_samples, self.source, self.vocab)
        started, saved, first_step = time.monotonic(), time.monotonic(), self.step
        spent_before = self.seconds
        for batches in self._pools():
            for batch in batches:
                loss = self._optimizer_step(batch)
                self.step += 1
                self.seconds = spent_before + time.monotonic() - started
                if self.step % self.config.validate_every_steps == 0 or self.step == optim.steps:
                    self._validate(validation, loss)
                pace = (time.monotonic() - started) / (self.step - first_step)
                on_step(self._report(loss, pace * (optim.steps - self.step)))
                if self.step == optim.steps:
                    self._save()
                    return
            # Only between pools: what a pool holds is gone with the process, so a resumed run could not finish it.
            if time.monotonic() - saved > self.config.save_every_seconds:
                self._save()
                saved = time.monotonic()

    def _pools(self) -> Iterator[list[Batch]]:
        """Run the target over a few groups of sequences and shuffle the optimizer steps that they give."""
        optim = self.config.optim
        groups = self._groups()
        while True:
            rng = random.Random(f"anchors/{self.config.seed}/{self.forwards}")
            batches = []
            for sequences in itertools.islice(groups, optim.pool):
                supervision = supervise(self.source, self.target, sequences, self.vocab)
                draws = draw_anchors(sequences, optim.anchors, optim.steps_per_forward, rng)
                batches += [Batch(supervision, sequences, anchors_BA) for anchors_BA in draws]
                self.tokens += int(sequences.mask_BT.sum())
                self.forwards += 1
            rng.shuffle(batches)
            yield batches

    def _optimizer_step(self, batch: Batch) -> float:
        blocks = cut_blocks(batch.sequences, batch.anchors_BA, self.config.drafter.block_size)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.optim.precision == "bf16"):
            losses = self.objective(batch.supervision, blocks)
        if not torch.isfinite(losses.total):
            raise TrainingError(
                f"the loss is {losses.total.item()} at step {self.step}",
                expected="a finite loss",
                fix="Run again to resume from the last checkpoint, with a lower optim.learning_rate.",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(self.config.optim, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        nn.utils.clip_grad_norm_(self.drafter.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        return losses.total.item()

    def _groups(self) -> Iterator[Sequences]:
        """Endless groups of sequences of similar length, from where the run stands (the cursor is `forwards`)."""
        to_skip = self.forwards
        for epoch in itertools.count():
            rng = random.Random(f"epoch/{self.config.seed}/{epoch}")
            order = self.train_samples[:]
            rng.shuffle(order)
            groups = _similar_lengths(order, self.config.optim.sequences)
            rng.shuffle(groups)
            yield from (pad(group) for group in groups[to_skip:])
            to_skip = max(0, to_skip - len(groups))

    def _validate(self, validation: Validation, loss: float) -> None:
        result = validation.run(self.objective, self.config.drafter.block_size)
        row = {"step": self.step, "seconds": round(self.seconds, 1), "tokens": self.tokens, "loss": loss}
        self.history.append(row | result)
        self.output.mkdir(parents=True, exist_ok=True)
        with (self.output / "log.jsonl").open("a") as file:
            file.write(json.dumps(self.history[-1]) + "\n")
        log.info("step %d: %s", self.step, result)

    def _report(self, loss: float, seconds_left: float) -> StepReport:
        newest = self.history[-1]["accepted_length"] if self.history else math.nan
        return StepReport(self.step, self.config.optim.steps, loss, newest, self.tokens, seconds_left)

    def _save(self) -> None:
        state = {"forwards": self.forwards, "tokens": self.tokens, "seconds": self.seconds, "history": self.history}
        checkpoint.save(self.output / "checkpoints", self.step, self.drafter, self.optimizer, state)

    def _resume(self) -> None:
        path = checkpoint.latest(self.output / "checkpoints")
        if path is None:
            return
        state = checkpoint.restore(path, self.drafter, self.optimizer)
        self.step, self.forwards, self.tokens = state["step"], state["forwards"], state["tokens"]
        self.seconds, self.history = state["seconds"], state["history"]
        log.info("resumed at step %d", self.step)


def _similar_lengths(samples: list[Sample], size: int) -> list[list[Sample]]:
    """Cut shuffled samples into groups of `size`, sorted by length within windows so that little is padded."""
    window = size * 8
    groups = []
    for start in range(0, len(samples), window):
        part = sorted(samples[start : start + window], key=lambda s: len(s.ids))
        groups += [part[i : i + size] for i in range(0, len(part), size)]
    return [g for g in groups if len(g) == size] or groups
