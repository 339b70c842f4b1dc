"""What a run will take, before it runs: steps, tokens, bytes, and the time that a short measurement suggests."""

from __future__ import annotations

import contextlib
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from dspark_serving.errors import DataError
from dspark_training.config import RunConfig
from dspark_training.data.generate import Request, complete
from dspark_training.data.prompts import read_prompts
from dspark_training.data.skipped import Skipped
from dspark_training.data.store import Sample
from dspark_training.data.tokenizer import fingerprint
from dspark_training.data.tokens import load_samples
from dspark_training.features.compress import CODECS, deepspec_bytes_per_token
from dspark_training.target import Target
from dspark_training.trainer import StepReport, Trainer
from dspark_training.workdir import SAMPLES, is_complete

_PROMPT_TOKENS = 64  # of a prompt that is not written yet
_ANSWERS_SHARE = 0.3  # of the measurement


class Plan(NamedTuple):
    """Figures of a run; those marked (measured) come from this machine, just now."""

    samples: int
    sample_tokens: float  # mean of a sample; an upper limit where answers do not exist yet
    exact: bool  # the samples exist already
    answers_left: int
    steps: int
    epochs: float
    tokens: int  # that the target runs over, or that are read back from the cache
    disk_checkpoint: int  # bytes
    disk_features: int
    deepspec_features: int  # what DeepSpec's cache would take for the same samples
    memory: int  # bytes; the largest resident set of the measurement (measured)
    answer_seconds: float  # a whole estimate, from measured pace
    step_seconds: float  # of one optimizer step with online features (measured)

    def lines(self) -> list[str]:
        """For the terminal."""
        limit = "" if self.exact else " (at most)"
        whole = _time(self.answer_seconds + self.steps * self.step_seconds)
        return [
            f"samples: {self.samples:,} of {self.sample_tokens:.0f} tokens{limit}, {self.answers_left:,} unanswered",
            f"steps: {self.steps:,}, {self.epochs:.1f} epochs, {self.tokens:,} target tokens",
            f"disk: {_size(self.disk_checkpoint)} of checkpoints, {_size(self.disk_features)} of features "
            f"(DeepSpec's cache of these samples: {_size(self.deepspec_features)})",
            f"memory: {_size(self.memory)} at its peak in the measurement",
            f"time: {whole} ({_time(self.answer_seconds)} for answers, "
            f"{self.step_seconds:.2f} s a step with online features); measured briefly, so expect 30 % either way",
        ]


def make_plan(config: RunConfig, target: Target, work: Path, seconds: float) -> Plan:
    """Measure answers and training steps for about `seconds`, and extrapolate; nothing is written to `work`.

    Raises:
        DataError: there are no prompts.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    samples, sample_tokens, prompt_tokens, left = _data(config, target, work)
    rng = random.Random(config.seed)
    per_answer = _answer_pace(config, target, prompt_tokens, seconds * _ANSWERS_SHARE, rng) if left else 0.0
    pace, trained = _step_pace(config, target, sample_tokens, prompt_tokens, seconds * (1 - _ANSWERS_SHARE), rng)
    optim, features = config.optim, config.features
    forwards = optim.steps * optim.micro_batches / optim.steps_per_forward
    train_samples = samples * (1 - config.data.validation_share)
    layers, hidden = len(config.drafter.target_layer_ids), target.config.hidden_size
    share = 1 - prompt_tokens / sample_tokens
    stored = CODECS[features.codec].bytes_per_token(layers, hidden, share) * samples * sample_tokens
    return Plan(
        samples=samples,
        sample_tokens=sample_tokens,
        exact=left == 0,
        answers_left=left,
        steps=optim.steps,
        epochs=forwards * optim.sequences / train_samples,
        tokens=round(forwards * optim.sequences * sample_tokens),
        disk_checkpoint=2 * 4 * _state_values(trained),  # the old one stays until the new one is complete
        disk_features=round(min(stored, features.cap_gb * 1e9)) if features.source == "cached" else 0,
        deepspec_features=round(deepspec_bytes_per_token(layers, hidden) * samples * sample_tokens),
        memory=_peak_bytes(),
        answer_seconds=per_answer * left,
        step_seconds=pace,
    )


def _data(config: RunConfig, target: Target, work: Path) -> tuple[int, float, float, int]:
    """Samples, mean tokens of a sample and of its prompt, and answers still to be generated."""
    data = config.data
    answered = data.samples is not None or is_complete(work)
    kept = Path(data.samples) if data.samples is not None else work / SAMPLES
    done = load_samples(kept, fingerprint(target.tokenizer)) if answered or kept.exists() else []
    prompts = [] if answered else [p for name in data.prompts for p in read_prompts(name, Skipped(None))]
    count = len(prompts) + (0 if answered else sum(data.written_prompts.values()))
    count = min(count, data.max_samples or count)
    if not count and not done:
        raise DataError("no prompts", expected="data.samples, data.prompts or data.written_prompts", fix="Name some.")
    left = max(0, count - len(done))
    if done:
        total = sum(len(s.ids) for s in done) / len(done)
        return len(done) + left, total, total - sum(s.supervised for s in done) / len(done), left
    shown = prompts[:64]
    asked = sum(len(target.chat_ids(p.text)) for p in shown) / len(shown) if shown else _PROMPT_TOKENS
    return count, asked + data.max_new_tokens, asked, left


def _answer_pace(config: RunConfig, target: Target, prompt_tokens: float, seconds: float, rng: random.Random) -> float:
    """Seconds an answer in a full batch, extrapolated from its first tokens."""
    data = config.data
    ids = [_random_ids(target, prompt_tokens, rng) for _ in range(data.batch_size)]
    generator, tokens = torch.Generator().manual_seed(config.seed), 4
    while True:
        requests = [Request(str(i), row, 1.0, tokens) for i, row in enumerate(ids)]
        started = time.monotonic()
        for _ in complete(target, requests, batch_size=data.batch_size, generator=generator):
            pass
        spent = time.monotonic() - started
        if spent * 3 > seconds or tokens * 2 > data.max_new_tokens:
            return spent / tokens * data.max_new_tokens / data.batch_size
        tokens *= 2


def _step_pace(
    config: RunConfig,
    target: Target,
    sample_tokens: float,
    prompt_tokens: float,
    seconds: float,
    rng: random.Random,
) -> tuple[float, Trainer]:
    """Seconds an optimizer step on random tokens of the expected length, with the real trainer."""
    optim = config.optim
    rows = []
    for i in range(2 * optim.pool * optim.sequences):
        ids = _random_ids(target, sample_tokens, rng)
        rows.append(Sample(f"{i:06}", "plan", 1.0, ids, [(min(round(prompt_tokens), len(ids) - 3), len(ids))]))
    online = config.features.model_copy(update={"source": "online"})
    told = config.model_copy(
        update={"features": online, "validate_every_steps": sys.maxsize, "save_every_seconds": 1e9, "warm_start": None}
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(told, target, rows, Path(scratch))
        started = time.monotonic()
        steps = 0

        def stop(report: StepReport) -> None:
            nonlocal steps
            steps = report.step
            if time.monotonic() - started > seconds:
                raise _EnoughError

        with contextlib.suppress(_EnoughError):
            trainer.run(stop)
        return trainer.seconds / max(1, steps), trainer


class _EnoughError(Exception):
    """The measurement has what it needs."""


def _random_ids(target: Target, tokens: float, rng: random.Random) -> list[int]:
    return [rng.randrange(target.config.vocab_size) for _ in range(max(8, round(tokens)))]


def _state_values(trainer: Trainer) -> int:
    """Numbers in a checkpoint: weights and the optimizers' moments."""
    weights = sum(p.numel() for p in trainer.drafter.parameters())
    moments = sum(value.numel() for o in trainer.optimizers for state in o.state.values() for value in state.values())
    return weights + moments


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
