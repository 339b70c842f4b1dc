"""What is sent to every arm: datasets, loads, and the arguments that `sglang.benchmark.serving` gets for them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from dspark_serving.errors import DataError

_GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, modulo 1, are spread evenly from the first few on."""


class Dataset(NamedTuple):
    """Prompts of a JSONL file (a `prompt` a line), or a dataset of SGLang's client."""

    name: str
    path: Path | None = None  # None: `name` is what the client's --dataset-name knows


class Load(NamedTuple):
    """How hard the server is pressed: requests under way, or requests a second (Poisson); one of both."""

    concurrency: int | None = None
    request_rate: float | None = None

    def __str__(self) -> str:
        return f"x{self.concurrency}" if self.concurrency is not None else f"{self.request_rate:g}/s"


class Shape(NamedTuple):
    """How many requests of which length a run has."""

    prompts: int  # at least; a run has no fewer than its concurrency, so that the load is what it says
    max_tokens: int  # of an answer to a prompt of a file in the mean, see `lengths`
    ignore_eos: bool  # no answer ends earlier
    waves: int = 1  # requests by concurrency, as far as a file of prompts goes

    def requests(self, load: Load, available: int | None = None) -> int:
        """Requests of one run.

        Where all requests start at once, plain decoding ends them all at once, while speculation ends them one by one
        and its last rounds are small: several waves make that tail a small part of a run.

        Args:
            available: prompts in the file; None where the client makes them.
        """
        concurrency = load.concurrency or 0
        several = self.waves * concurrency
        return max(self.prompts, concurrency, several if available is None else min(several, available))

    def lengths(self, requests: int) -> list[int]:
        """Tokens of each answer, spread evenly from a half to one and a half times `max_tokens`.

        Answers of one length would start and end in step where nothing speculates, and be prefilled together ever
        after: a gain for plain decoding that no real load gives it.
        """
        return [max(round(self.max_tokens * (0.5 + (0.5 + number * _GOLDEN) % 1.0)), 1) for number in range(requests)]


def client_arguments(
    dataset: Dataset, load: Load, temperature: float, shape: Shape, *, seed: int, scratch: Path
) -> list[str]:
    """The arguments by which SGLang's client sends the same requests in the same order whenever it is called.

    Raises:
        DataError: the prompt file cannot be read or has too few prompts.
    """
    prompts = None if dataset.path is None else read_prompts(dataset.path)
    requests = shape.requests(load, None if prompts is None else len(prompts))
    body = {"temperature": temperature, "ignore_eos": shape.ignore_eos, "stream_options": {"include_usage": True}}
    arguments = ["--backend", "sglang-oai-chat", "--num-prompts", str(requests), "--seed", str(seed)]
    arguments += ["--extra-request-body", json.dumps(body)]
    if load.concurrency is not None:
        arguments += ["--max-concurrency", str(load.concurrency)]
    if load.request_rate is not None:
        arguments += ["--request-rate", str(load.request_rate)]
    if prompts is not None:
        if len(prompts) < requests:
            fix = "Ask for fewer prompts or a lower concurrency."
            raise DataError(f"{dataset.path} has {len(prompts)} prompts", expected=f"{requests}", fix=fix)
        path = _request_file(prompts[:requests], shape.lengths(requests), scratch / f"{dataset.name}.jsonl")
        return [*arguments, "--dataset-name", "openai", "--dataset-path", str(path)]
    arguments += ["--dataset-name", dataset.name, "--random-range-ratio", "1.0"]
    # Each dataset of the client has its own name for the length of an answer.
    for flag in ("--sharegpt-output-len", "--random-output-len", "--gsp-output-len", "--speed-bench-output-len"):
        arguments += [flag, str(shape.max_tokens)]
    return arguments


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSONL file.

    Raises:
        DataError: it cannot be read, or a line has no `prompt`.
    """
    try:
        return [str(json.loads(line)["prompt"]) for line in path.read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no file of prompts ({type(error).__name__}: {error})",
            expected='JSON lines with the key "prompt"',
            fix="See benchmarks/prompts for examples.",
        ) from error


def expected_seconds(load: Load, shape: Shape) -> float:
    """Of one run, roughly: on two CPU cores, SmolLM2-135M, no speculation; elsewhere right in proportion at best."""
    overhead, prefill, slope, base = 2.0, 0.2, 0.0073, 0.068  # a step of 1 request takes 0.075 s, of 32 0.3 s
    requests = shape.requests(load)
    if load.concurrency is None:
        return overhead + requests / (load.request_rate or math.inf) + shape.max_tokens * (base + slope)
    waves = math.ceil(requests / load.concurrency)
    return overhead + requests * prefill + waves * shape.max_tokens * (base + slope * load.concurrency)


def _request_file(prompts: list[str], lengths: list[int], path: Path) -> Path:
    """The prompts in the form that the client sends unchanged and in this order (its `custom` form shuffles them)."""
    rows = [
        {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
        for prompt, tokens in zip(prompts, lengths, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
