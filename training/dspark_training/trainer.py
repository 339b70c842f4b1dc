"""The training loop: frozen target and drafter in one process (or in several of the kind), resumable at any step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dspark_serving.errors import DataError, DsparkError
from dspark_training import checkpoint
from dspark_training.batches import Draw, pools
from dspark_training.config import RunConfig
from dspark_training.data.blocks import Blocks, cut_blocks
from dspark_training.data.store import Sample, require_ids_below, split
from dspark_training.data.vocab import DraftVocab
from dspark_training.evaluation.validation import Validation
from dspark_training.features.cache import CachedFeatures, CacheIdentity, layer_columns
from dspark_training.features.source import FeatureSource, OnlineFeatures
from dspark_training.models.check import check_settings
from dspark_training.models.setup import Drafter, feature_scale, new_drafter
from dspark_training.models.warm_start import warm_start
from dspark_training.objectives.build import Objective, build_objective
from dspark_training.objectives.supervision import Supervision, supervise
from dspark_training.optimizer import AveragedWeights, build_optimizers, learning_rate
from dspark_training.processes import Processes
from dspark_training.runlog import RunLog
from dspark_training.target import Target

log = logging.getLogger(__name__)

_SCALE_SAMPLES = 16


class StepReport(NamedTuple):
    """What a progress bar shows after an optimizer step."""

    step: int
    steps: int
    loss: float
    accepted_length: float  # newest validation, bonus included; nan before the first
    tokens: int  # target tokens run so far, by all processes


class Best(NamedTuple):
    """The best validation so far."""

    step: int
    accepted_length: float
    since: int  # validations after it


class TrainingError(DsparkError):
    """The run cannot go on; the last checkpoint is intact."""


class Trainer:
    """Trains one drafter; construct, then run(). A second run in the same directory resumes.

    Args:
        config: the resolved configuration.
        target: the frozen target.
        samples: conversations; a share of them is held out.
        output: directory of checkpoints, logs and (by default) cached features.
        processes: this process and its peers; only the first one writes there.

    Raises:
        DataError: fewer than two samples, none with a token to predict, or an id that the target does not have.
        OptionError, CheckpointError: the configuration, or the drafter to start from, does not fit the target.
    """

    def __init__(
        self,
        config: RunConfig,
        target: Target,
        samples: Sequence[Sample],
        output: Path,
        processes: Processes | None = None,
    ) -> None:
        if len(samples) < 2:
            raise DataError(f"{len(samples)} samples to train on", expected="at least 2", fix="Generate answers first.")
        require_ids_below(samples, target.config.vocab_size)
        self.config, self.target, self.output = config, target, output
        self.processes = processes or Processes()
        check_settings(config, target, self.processes.world)
        self.train_samples, self.validation_samples = split(samples, config.data.validation_share)
        self.vocab, self.coverage = DraftVocab.most_frequent(
            self.train_samples,
            config.drafter.draft_vocab_size,
            target.config.vocab_size,
            target.stop_ids,
            target.device,
        )
        self.drafter: Drafter = new_drafter(target, config.drafter, config.algorithm, config.seed)
        self.layer_ids = config.drafter.target_layer_ids
        held = config.features.layer_ids or self.layer_ids
        columns = layer_columns(held, self.layer_ids, target.config.hidden_size)
        held_scale_M = feature_scale(target, self.train_samples[:_SCALE_SAMPLES], held)
        self.scale_M = held_scale_M[columns]
        if config.warm_start is not None:
            start = config.warm_start
            warm_start(self.drafter, target, self.layer_ids, self.scale_M, Path(start.path), start.part)
        self.source = self._feature_source(held, held_scale_M)
        self.optimizers = build_optimizers(self.drafter, config.optim)
        ema = config.optim.ema_decay
        self.averaged = AveragedWeights(self.drafter, ema) if ema else None
        self.objective: Objective = build_objective(config.algorithm, self.drafter, target, self.vocab, config.optim)
        self.step, self.forwards, self.tokens, self.seconds = 0, 0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.best = Best(0, -math.inf, 0)
        self._between_pools = True

    def run(self, on_step: Callable[[StepReport], None] = lambda report: None) -> None:
        """Train up to config.optim.steps, or until patience ends; then `drafter` has the weights to keep.

        Resumes from the newest checkpoint under the output directory.

        Raises:
            TrainingError: loss or gradients are not finite, or there is nothing to predict in the data.
            DataError: no held-out answer has two tokens, or the log cannot be written.
            CheckpointError: a checkpoint cannot be written or read.
        """
        self._resume()
        first = self.processes.first
        validation = Validation(self.validation_samples, self.source, self.vocab) if first else None
        records = RunLog(self.output, self.config.tensorboard, self.history) if first else None
        module = self.processes.wrap(_Step(self.objective))
        started = saved = time.monotonic()
        spent_before = self.seconds
        for loss in self._losses(module):
            self.seconds = spent_before + time.monotonic() - started
            if self._validates_now() and validation is not None and records is not None:
                self._validate(validation, loss, records)
            on_step(self._report(loss))
            # Only between pools: what a pool holds is gone with the process, so a resumed run could not finish it.
            if self._between_pools and time.monotonic() - saved > self.config.save_every_seconds:
                self._save()
                saved = time.monotonic()
        self._save()
        self._keep_the_best()

    def _losses(self, module: nn.Module) -> Iterator[float]:
        """Optimizer steps, one a value, until the run is over."""
        optim = self.config.optim
        for pool in pools(self.train_samples, optim, self.config.seed, self.forwards):
            if self.step >= optim.steps or self._out_of_patience():
                return
            if not pool.steps:
                raise TrainingError(
                    f"no token to predict in {optim.pool} groups of samples at step {self.step}",
                    expected="answers of at least two tokens",
                    fix="Check the data with `dspark data stats`.",
                )
            self.forwards, self.tokens = pool.forwards, self.tokens + pool.tokens
            supervised: dict[int, Supervision] = {}
            for i, step in enumerate(pool.steps, start=1):
                loss = self._optimizer_step(module, step[self.processes.rank :: self.processes.world], supervised)
                self.step += 1
                self._between_pools = i == len(pool.steps)
                yield loss
                if self.step >= optim.steps or self._out_of_patience():
                    return

    def _optimizer_step(self, module: nn.Module, draws: list[Draw], supervised: dict[int, Supervision]) -> float:
        """Accumulate the gradients of this process' micro-batches, average them over the processes, and step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        device = self.target.device
        total = torch.zeros((), device=device)
        for i, draw in enumerate(draws, start=1):
            sequences = draw.sequences.to(device)
            if draw.forward not in supervised:
                supervised[draw.forward] = supervise(self.source, sequences, self.vocab)
            blocks = cut_blocks(sequences, draw.anchors_BA, self.config.drafter.block_size)
            last = i == len(draws)
            with nullcontext() if last else self.processes.without_averaging(module):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.config.optim.precision == "bf16"):
                    loss: Tensor = module(supervised[draw.forward], blocks) / len(draws)
                _require_finite("loss", loss, self.step)
                loss.backward()
            total += loss.detach()
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["lr_scale"] * learning_rate(self.config.optim, self.step)
        norm = nn.utils.clip_grad_norm_(self.drafter.parameters(), self.config.optim.clip_norm)
        _require_finite("norm of the gradients", norm, self.step)  # clipping by it has made all of them NaN
        for optimizer in self.optimizers:
            optimizer.step()
        if self.averaged is not None:
            self.averaged.update(self.step + 1)
        return self.processes.mean(total)

    def _feature_source(self, held: tuple[int, ...], held_scale_M: Tensor) -> FeatureSource:
        features = self.config.features
        if features.source == "online":
            return OnlineFeatures(self.target, self.layer_ids, self.scale_M)
        online = OnlineFeatures(self.target, held, held_scale_M)
        directory = Path(features.directory) if features.directory else self.output / "features"
        identity = CacheIdentity.of(self.target, held, held_scale_M)
        writer = (self.processes.rank, self.processes.world)
        return CachedFeatures(
            online,
            directory,
            int(features.cap_gb * 1e9),
            features.codec,
            identity,
            self.layer_ids,
            self.target.model.dtype,
            writer,
        )

    def _validates_now(self) -> bool:
        return self.step % self.config.validate_every_steps == 0 or self.step == self.config.optim.steps

    def _validate(self, validation: Validation, loss: float, records: RunLog) -> None:
        with self.averaged.in_place() if self.averaged is not None else nullcontext():
            result = validation.run(self.objective, self.config.drafter.block_size)
            accepted_length = float(result["accepted_length"])  # type: ignore[arg-type]
            if accepted_length > self.best.accepted_length:
                self.best = Best(self.step, accepted_length, 0)
                if self.config.optim.patience is not None:
                    checkpoint.save_weights(self.output / "best.safetensors", self.drafter)
            else:
                self.best = self.best._replace(since=self.best.since + 1)
        row = {"step": self.step, "seconds": round(self.seconds, 1), "tokens": self.tokens, "loss": loss}
        if isinstance(self.source, CachedFeatures):
            row |= {f"cache_{key}": value for key, value in self.source.counts._asdict().items()}
        self.history.append(row | result)
        records.add(self.history[-1])
        log.info("step %d: %s", self.step, result)

    def _out_of_patience(self) -> bool:
        patience = self.config.optim.patience
        if patience is None or not self._validates_now():
            return False
        return self.processes.agree(self.best.since >= patience)

    def _keep_the_best(self) -> None:
        """Leave the weights that validation measured in `drafter`: the best ones, or the averaged ones."""
        self.processes.wait()
        best = self.output / "best.safetensors"
        if self.config.optim.patience is not None and best.exists():
            checkpoint.load_weights(best, self.drafter)
        elif self.averaged is not None:
            self.averaged.keep()

    def _report(self, loss: float) -> StepReport:
        newest = self.history[-1]["accepted_length"] if self.history else math.nan
        return StepReport(self.step, self.config.optim.steps, loss, newest, self.tokens)

    def _save(self) -> None:
        if not self.processes.first:
            return
        state = {
            "forwards": self.forwards,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "history": self.history,
            "best": self.best._asdict() if self.history else None,
        }
        average = self.averaged.average if self.averaged is not None else None
        checkpoint.save(self.output / "checkpoints", self.step, self.drafter, self.optimizers, state, average)

    def _resume(self) -> None:
        path = checkpoint.latest(self.output / "checkpoints")
        if path is not None:
            average = self.averaged.average if self.averaged is not None else None
            state = checkpoint.restore(path, self.drafter, self.optimizers, average)
            self.step, self.forwards, self.tokens = state["step"], state["forwards"], state["tokens"]
            self.seconds, self.history = state["seconds"], state["history"]
            self.best = Best(**state["best"]) if state["best"] else self.best
            log.info("resumed at step %d", self.step)
        self.processes.wait()  # nobody writes a checkpoint before everybody has read this one


class _Step(nn.Module):
    """The objective as a module, so that gradients can be averaged over processes wherever it uses a parameter."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.drafter = objective.drafter
        self._objective = objective

    def forward(self, supervision: Supervision, blocks: Blocks) -> Tensor:
        return self._objective(supervision, blocks).total


def _require_finite(name: str, value: Tensor, step: int) -> None:
    if not torch.isfinite(value):
        raise TrainingError(
            f"the {name} is {value.item()} at step {step}",
            expected=f"a finite {name}",
            fix="Set a lower optim.learning_rate and another --work; data.samples may name the samples.jsonl of this "
            "one.",
        )
