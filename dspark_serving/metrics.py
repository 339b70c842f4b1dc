"""Counters of the serving rounds, for /server_info and for Prometheus."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeVar

from prometheus_client import Counter, Gauge

from dspark_serving.scheduler.cost_fit import round_up
from dspark_serving.scheduler.round import Outcome

P = ParamSpec("P")
R = TypeVar("R")

WINDOW = 256
"""Rounds over which times and accepted length are averaged."""


class RoundStats:
    """Totals since the start and rolling means over the last rounds; times are the host's."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start over."""
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._total_seconds: dict[str, float] = defaultdict(float)
        self._accepted: deque[tuple[int, int]] = deque(maxlen=WINDOW)  # (requests, accepted tokens)
        self._reasons: dict[str, int] = defaultdict(int)
        self.rounds = 0
        self.requests = 0
        self.tokens = 0
        self.verified_tokens = 0
        self.padding_tokens = 0
        self.tier_tokens = 0
        self.budget_tokens = 0

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase].append(seconds)
        self._total_seconds[phase] += seconds

    def timed(self, phase: str, function: Callable[P, R]) -> Callable[P, R]:
        """`function`, with its duration counted under `phase`."""

        def measure(*args: P.args, **kwargs: P.kwargs) -> R:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._add(phase, time.perf_counter() - start)

        return measure

    @contextmanager
    def round(self) -> Iterator[None]:
        """Time one whole round."""
        start = time.perf_counter()
        yield
        self._add("round", time.perf_counter() - start)
        self.rounds += 1

    def count(self, outcome: Outcome, gamma: int, tiers: tuple[int, ...] | None = None) -> None:
        """Count a finished round.

        Args:
            gamma: drafted tokens a block.
            tiers: captured token totals; the one that runs is chosen by what the plan allows. None: nothing is padded.
        """
        requests = outcome.batch.requests
        tokens = int(outcome.accepted_R.sum()) + requests
        self._accepted.append((requests, tokens))
        self._reasons[outcome.plan.reason] += 1
        self.requests += requests
        self.tokens += tokens
        verified = int(outcome.verify_lens_R.sum())
        self.budget_tokens = min(outcome.plan.capacity, requests * gamma) if outcome.plan.drafts else 0
        self.tier_tokens = verified if tiers is None else round_up(requests + self.budget_tokens, tiers)
        self.verified_tokens += verified
        self.padding_tokens += self.tier_tokens - verified

    def newest(self, phase: str) -> float:
        """Seconds of the last time that `phase` ran; 0 before."""
        times = self._seconds[phase]
        return times[-1] if times else 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Mean seconds of each phase over the window."""
        return {phase: sum(times) / len(times) for phase, times in self._seconds.items() if times}

    @property
    def accepted_length(self) -> float | None:
        """Tokens a request and round over the window, the bonus token included; None before the first round."""
        requests = sum(count for count, _ in self._accepted)
        return sum(tokens for _, tokens in self._accepted) / requests if requests else None

    def snapshot(self) -> dict[str, Any]:
        """Everything as plain values, in base units; totals first, so that differences of two snapshots are exact."""
        return {
            "rounds": self.rounds,
            "request_rounds": self.requests,
            "output_tokens": self.tokens,
            "verified_tokens": self.verified_tokens,
            "padding_tokens": self.padding_tokens,
            "phase_seconds_total": dict(self._total_seconds),
            "plans": dict(self._reasons),
            "accepted_length": self.accepted_length,
            "phase_seconds": self.seconds,
        }


_MOST_RECENT: Literal["mostrecent"] = "mostrecent"


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, list(labels), multiprocess_mode=_MOST_RECENT)


class ServerMetrics:
    """What /metrics shows beside SGLang's own; made in the scheduler, once the multi-process registry is set up."""

    def __init__(self, version: str) -> None:
        self._version = version
        self._policy: str | None = None
        self._active = _gauge(
            "dspark_plugin_active", "1 for the policy in force while dspark-serving serves", "version", "policy"
        )
        self._seconds = _gauge("dspark_phase_seconds", "Rolling mean of a round's phase", "phase")
        self._accepted = _gauge("dspark_accepted_length", "Tokens a request and round, bonus token included")
        self._step = _gauge("dspark_step_seconds", "Time of the newest round, as planned and as measured", "kind")
        self._tokens = _gauge("dspark_round_tokens", "Tokens of the newest round, as planned and as realised", "kind")
        self._capacity = _gauge("dspark_budget_tokens", "Drafted tokens that the newest plan admits at most")
        self._price = _gauge("dspark_price", "Weight times survival that a drafted token must reach")
        self._facts = _gauge("dspark_scheduler", "State of the scheduler: what it has learned and counted", "fact")
        self._rounds = Counter("dspark_rounds", "Rounds by the reason of their plan", ["reason"])
        self._verified = Counter("dspark_verified_tokens", "Rows of verification forwards, anchors included")
        self._padding = Counter("dspark_padding_tokens", "Rows that verification forwards were padded with")
        self._tier = _gauge("dspark_tier_tokens", "Rows of the newest verification forward, padding included")

    def set_policy(self, name: str) -> None:
        """Show `name` as the policy in force."""
        if self._policy is not None:
            self._active.labels(self._version, self._policy).set(0)
        self._active.labels(self._version, name).set(1)
        self._policy = name

    def update(self, stats: RoundStats, outcome: Outcome, facts: dict[str, float]) -> None:
        """Publish the newest round."""
        for phase, seconds in stats.seconds.items():
            self._seconds.labels(phase).set(seconds)
        if stats.accepted_length is not None:
            self._accepted.set(stats.accepted_length)
        plan = outcome.plan
        self._step.labels("planned").set(plan.expected_seconds)
        self._step.labels("measured").set(outcome.seconds)
        self._tokens.labels("planned").set(plan.expected_tokens)
        self._tokens.labels("realised").set(int(outcome.accepted_R.sum()) + outcome.batch.requests)
        self._capacity.set(stats.budget_tokens)
        self._price.set(plan.price)
        self._rounds.labels(plan.reason).inc()
        verified = int(outcome.verify_lens_R.sum())
        self._verified.inc(verified)
        self._padding.inc(stats.tier_tokens - verified)
        self._tier.set(stats.tier_tokens)
        for name, value in facts.items():
            self._facts.labels(name).set(value)
