"""Runs, settings and a load client that are made up, for the tests of the measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark_serving.bench.arms import Arm, Attached, PolicyChoice
from dspark_serving.bench.client import Answers, Sample
from dspark_serving.bench.plan import Point, RunKey, Settings
from dspark_serving.bench.runs import Run
from dspark_serving.bench.server_api import Counters
from dspark_serving.bench.workload import Dataset, Load, Shape

POINT = Point("gsm8k", 0.0, Load(concurrency=1))


def sample(seconds: float = 1.0, *, tokens: int = 10, text: str = "text") -> Sample:
    """An answer in four pieces, the first after a tenth of the time."""
    return Sample(text, tokens, 0.1 * seconds, (0.3 * seconds,) * 3)


def one_by_one(
    arm: str,
    seconds: Sequence[float],
    *,
    point: Point = POINT,
    repetition: int = 0,
    text: str = "text",
    counters: Counters | None = None,
) -> Run:
    """A run at concurrency 1, ten tokens an answer."""
    samples = tuple(sample(s, text=text) for s in seconds)
    return Run(RunKey(point, repetition, arm), float(np.sum(seconds)), samples, counters)


def settings_of(*arms: Arm, **changes: Any) -> Settings:
    """Of a small sweep at one point; the first arm is the baseline, the last the candidate."""
    names = [arm.name for arm in arms]
    values: dict[str, Any] = {
        "target": "a target",
        "arms": arms,
        "datasets": (Dataset("gsm8k"),),
        "temperatures": (0.0,),
        "loads": (Load(concurrency=1),),
        "shape": Shape(2, 8, True),
        "repetitions": 2,
        "baseline": names[0],
        "candidate": names[-1],
        "rivals": tuple(names[:-1]),
    }
    return Settings(**(values | changes))


def policy_arms(url: str, *policies: str) -> tuple[Arm, ...]:
    """Arms of one server, named like their policies."""
    return tuple(Arm(policy, Attached(url), PolicyChoice(policy)) for policy in policies)


class StandInClient:
    """Answers instead of SGLang's client.

    Args:
        scratch: a directory.
        before: called before every run with its arguments.
    """

    def __init__(self, scratch: Path, before: Callable[[list[str]], None] = lambda _: None) -> None:
        self.scratch = scratch
        self.calls: list[list[str]] = []
        self._before = before

    def run(self, arguments: list[str]) -> Answers:
        self._before(arguments)
        self.calls.append(arguments)
        requests = int(arguments[arguments.index("--num-prompts") + 1])
        return Answers(float(requests), (sample(),) * requests)
