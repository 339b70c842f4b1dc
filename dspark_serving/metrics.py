"""Counters of the serving rounds, for /server_info and for Prometheus."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeVar

from prometheus_client import Gauge

P = ParamSpec("P")
R = TypeVar("R")

WINDOW = 256
"""Rounds over which times and accepted length are averaged."""


class RoundStats:
    """Rolling means over the last rounds; times are the host's."""

    def __init__(self) -> None:
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._accepted: deque[tuple[int, int]] = deque(maxlen=WINDOW)  # (requests, accepted tokens)
        self.rounds = 0
        self.requests = 0
        self.tokens = 0

    def timed(self, phase: str, function: Callable[P, R]) -> Callable[P, R]:
        """`function`, with its duration counted under `phase`."""

        def measure(*args: P.args, **kwargs: P.kwargs) -> R:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[phase].append(time.perf_counter() - start)

        return measure

    @contextmanager
    def round(self) -> Iterator[None]:
        """Time one whole round."""
        start = time.perf_counter()
        yield
        self._seconds["round"].append(time.perf_counter() - start)
        self.rounds += 1

    def count(self, correct_drafts: list[int]) -> None:
        """Count one round's accepted drafts, one number a request."""
        tokens = sum(correct_drafts) + len(correct_drafts)
        self._accepted.append((len(correct_drafts), tokens))
        self.requests += len(correct_drafts)
        self.tokens += tokens

    @property
    def seconds(self) -> dict[str, float]:
        """Mean seconds of each phase over the window."""
        return {phase: sum(times) / len(times) for phase, times in self._seconds.items()}

    @property
    def accepted_length(self) -> float | None:
        """Tokens a request and round over the window, the bonus token included; None before the first round."""
        requests = sum(count for count, _ in self._accepted)
        return sum(tokens for _, tokens in self._accepted) / requests if requests else None

    def snapshot(self) -> dict[str, Any]:
        """Everything as plain values, in base units."""
        return {
            "rounds": self.rounds,
            "request_rounds": self.requests,
            "output_tokens": self.tokens,
            "accepted_length": self.accepted_length,
            "phase_seconds": self.seconds,
        }


class ServerMetrics:
    """Gauges on SGLang's /metrics; made in the scheduler, after SGLang has set up the multi-process registry."""

    def __init__(self, version: str) -> None:
        mode: Literal["mostrecent"] = "mostrecent"
        self._version = version
        self._active = Gauge(
            "dspark_plugin_active",
            "1 for the policy in force while dspark-serving serves",
            ["version", "policy"],
            multiprocess_mode=mode,
        )
        self._seconds = Gauge(
            "dspark_phase_seconds", "Rolling mean of a round's phase", ["phase"], multiprocess_mode=mode
        )
        self._accepted = Gauge(
            "dspark_accepted_length", "Tokens a request and round, bonus token included", multiprocess_mode=mode
        )
        self._policy: str | None = None

    def set_policy(self, name: str) -> None:
        """Show `name` as the policy in force."""
        if self._policy is not None:
            self._active.labels(self._version, self._policy).set(0)
        self._active.labels(self._version, name).set(1)
        self._policy = name

    def update(self, stats: RoundStats) -> None:
        """Publish the rolling means."""
        for phase, seconds in stats.seconds.items():
            self._seconds.labels(phase).set(seconds)
        if stats.accepted_length is not None:
            self._accepted.set(stats.accepted_length)
