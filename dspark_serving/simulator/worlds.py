"""Synthetic truth: what rounds cost, what texts are like, what the confidence head says, and how all that moves.

Time enters as progress, 0 at the start and 1 at the end of a simulation. Seconds, tokens and logits throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Moving = Callable[[float], float]
"""Of the progress."""


def still(value: float) -> Moving:
    """No change."""
    return lambda progress: value


NOTHING, UNCHANGED = still(0.0), still(1.0)


def ramp(start: float, end: float) -> Moving:
    """Linear from the start to the end."""
    return lambda progress: start + (end - start) * progress


def there_and_back(start: float, middle: float) -> Moving:
    """To `middle` and back, once."""
    return lambda progress: start + (middle - start) * (1.0 - abs(2.0 * progress - 1.0))


def square(low: float, high: float, periods: int) -> Moving:
    """Bursts: `high` in the second half of each period."""
    return lambda progress: high if (progress * periods) % 1.0 >= 0.5 else low


def visits(*values: float) -> Moving:
    """Each value for an equal share of the time, in this order."""
    return lambda progress: values[min(int(progress * len(values)), len(values) - 1)]


@dataclass(frozen=True)
class Machine:
    """The true cost of a round: max(memory, tokens * compute) in waves, plus host, attention and the draft pass."""

    floor_seconds: float  # reading the weights, however few the tokens
    token_seconds: float  # of computing a token
    request_seconds: float  # of the host, for each request
    context_seconds: float  # of attention, for each committed token of the batch
    draft_floor_seconds: float
    draft_request_seconds: float
    smooth: float  # tokens over which the floor passes into computing; larger is smoother
    wave: int = 1  # tokens that are computed together: a staircase within the computing part
    tiers: tuple[int, ...] | None = None  # captured totals; None: eager
    busy: float = 1.0  # factor on the computing part: another tenant

    def draft(self, requests: int) -> float:
        """Seconds of the draft pass."""
        return self.draft_floor_seconds + requests * self.draft_request_seconds

    def verify(self, requests: int, tokens_N: np.ndarray, context: int) -> np.ndarray:
        """Seconds of the rest of the round for each total of verified tokens."""
        if self.tiers is not None:
            ends = np.append(self.tiers, 0)
            tokens_N = np.maximum(tokens_N, ends[np.searchsorted(self.tiers, tokens_N)])
        computing_N = np.ceil(np.asarray(tokens_N) / self.wave) * self.wave * self.token_seconds * self.busy
        soft = self.smooth * self.token_seconds
        forward_N = soft * np.logaddexp(self.floor_seconds / soft, computing_N / soft)
        seconds_N: np.ndarray = forward_N + requests * self.request_seconds + context * self.context_seconds
        return seconds_N

    def plain(self, requests: int, context: int) -> float:
        """Seconds of a round without drafts."""
        return float(self.verify(requests, np.array([requests]), context)[0])


@dataclass(frozen=True)
class Domain:
    """A kind of text, by the logit of a drafted token's survival given that those before it survived."""

    name: str
    mean: float
    by_position: float = -0.05  # added at every further position of the block
    by_request: float = 0.5  # standard deviations
    by_passage: float = 0.5  # of 32 tokens
    by_token: float = 1.0


@dataclass(frozen=True)
class World:
    """A scenario; everything that policies must find out is in here."""

    name: str
    kind: Literal["stationary", "moving"]
    machine: Machine
    domains: tuple[Domain, ...]
    requests: Moving  # concurrency
    gamma: int = 7
    prompt: tuple[int, int] = (64, 256)  # fewest and most tokens
    output: tuple[int, int] = (128, 384)
    rounds: int = 3000  # of plain decoding at the start: the length of the simulation
    easier: Moving = NOTHING  # added to every survival logit
    busy: Moving = UNCHANGED  # factor on the machine's computing
    slower: Moving = UNCHANGED  # factor on all times
    drafting: Moving = UNCHANGED  # factor on the times of drafting rounds alone
    confidence_scale: Moving = UNCHANGED  # the head's logit is scale * truth + shift
    confidence_shift: Moving = NOTHING
    noise: float = 0.03  # of measured times, log-normal
    outliers: float = 0.01  # share of rounds that take three times as long: other tenants, garbage collection
    lag: int = 0  # rounds by which results are late: 1 where the engine overlaps

    @cached_property
    def slots(self) -> int:
        """The highest concurrency."""
        return int(max(self.requests(i / 256) for i in range(257)))

    @cached_property
    def seconds(self) -> float:
        """Length of the simulation."""
        requests = int(self.requests(0.0))
        context = requests * (sum(self.prompt) + sum(self.output) // 2) // 2
        return self.rounds * self.machine.plain(requests, context)


PASSAGE = 32


class Text:
    """One request: how hard its tokens are to draft, and the luck of each. The same for every policy."""

    def __init__(self, world: World, seed: int, index: int) -> None:
        rng = np.random.default_rng((seed, index))
        domain = world.domains[index % len(world.domains)]
        self.domain = domain
        self.prompt = int(rng.integers(world.prompt[0], world.prompt[1] + 1))
        self.output = int(rng.integers(world.output[0], world.output[1] + 1))
        length = world.output[1] + world.gamma + 1
        passages = rng.normal(0.0, domain.by_passage, length // PASSAGE + 1).repeat(PASSAGE)[:length]
        self.level_L = domain.mean + domain.by_request * rng.normal() + passages
        self.logit_L = self.level_L + domain.by_token * rng.normal(size=length)
        self.luck_L = rng.random(length)
