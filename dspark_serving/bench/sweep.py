"""Makes the runs of a sweep: servers up, warmed up, arms in turn, each run kept as soon as it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

from dspark_serving.bench.arms import Arm, Host, opened
from dspark_serving.bench.client import Answers
from dspark_serving.bench.pace import Pace
from dspark_serving.bench.plan import Point, RunKey, Settings, turns
from dspark_serving.bench.runs import Run, RunFile
from dspark_serving.bench.server_api import (
    Counters,
    flush_cache,
    plugin_counters,
    server_info,
    set_policy,
    sglang_counters,
)
from dspark_serving.bench.workload import Shape, client_arguments

_WARM_UP_TOKENS = 8


class Client(Protocol):
    """What sends the requests: `LoadClient`, or a stand-in."""

    @property
    def scratch(self) -> Path:
        """A directory for the client's input."""

    def run(self, arguments: list[str]) -> Answers:
        """Run the load client."""


class Events(NamedTuple):
    """Who is told how it goes."""

    step: Callable[[str], None]
    run: Callable[[Run], None]


class Sweep:
    """A sweep under way.

    Args:
        settings: what is measured.
        client: sends the requests.
        file: keeps the runs; those in it are not made again.
        events: told of every step and run.
        logs: directory for the logs of launched servers.
        pace: tells how fast the machine was during a run.
    """

    def __init__(
        self, settings: Settings, client: Client, file: RunFile, events: Events, logs: Path, pace: Pace | None = None
    ) -> None:
        self._settings = settings
        self._client = client
        self._file = file
        self._events = events
        self._logs = logs
        self._pace = pace
        self._datasets = {dataset.name: dataset for dataset in settings.datasets}
        self._made = {run.key for run in file.runs}
        self._deadline = None if settings.time_limit is None else time.monotonic() + settings.time_limit

    def measure(self) -> None:
        """Make all missing runs, or as many as the time limit allows; turns are whole or not begun.

        Raises:
            EnvironmentMismatchError: a server or the client fails.
        """
        for session in self._settings.sessions:
            arms = {arm.name: arm for host_arms in session.values() for arm in host_arms}
            missing = [
                keys
                for turn in turns(self._settings, list(arms.values()))
                if (keys := [key for key in turn if key not in self._made])
            ]
            if missing and not self._late():
                self._measure_session(session, arms, missing)

    def _measure_session(
        self, session: Mapping[Host, list[Arm]], arms: Mapping[str, Arm], missing: list[list[RunKey]]
    ) -> None:
        with ExitStack() as servers:
            urls: dict[str, str] = {}
            for host, host_arms in session.items():
                log = self._logs / f"bench-{host_arms[0].name}.log"
                self._events.step(f"server of {', '.join(arm.name for arm in host_arms)} (log, if launched: {log})")
                url = servers.enter_context(opened(host, log))
                urls |= {arm.name: url for arm in host_arms}
            for name, arm in arms.items():
                self._events.step(f"warming up {name}")
                self._warm_up(arm, urls[name])
            for turn in missing:
                if self._late():
                    return
                for key in turn:
                    self._keep(self._run(key, arms[key.arm], urls[key.arm]))

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _warm_up(self, arm: Arm, url: str) -> None:
        """Let an arm pay its first-time costs, at the highest load and every temperature."""
        load = max(self._settings.loads, key=lambda load: load.concurrency or load.request_rate or 0.0)
        shape = self._settings.shape._replace(prompts=1, max_tokens=_WARM_UP_TOKENS)
        if arm.policy is not None:
            set_policy(url, arm.policy)
        for temperature in self._settings.temperatures:
            if temperature == 0 or not arm.greedy_only:
                self._send(Point(self._settings.datasets[0].name, temperature, load), shape, url)

    def _run(self, key: RunKey, arm: Arm, url: str) -> Run:
        flush_cache(url)
        if arm.policy is not None:
            set_policy(url, arm.policy)
        before = plugin_counters(server_info(url))
        answers = self._send(key.point, self._settings.shape, url)
        end = time.monotonic()
        pace_seconds = None if self._pace is None else self._pace.seconds(end - answers.seconds, end)
        counters = _counters_since(before, url, answers)
        return Run(key, answers.seconds, answers.samples, counters, pace_seconds)

    def _send(self, point: Point, shape: Shape, url: str) -> Answers:
        settings = self._settings
        arguments = client_arguments(
            self._datasets[point.dataset],
            point.load,
            point.temperature,
            shape,
            seed=settings.seed,
            scratch=self._client.scratch,
        )
        return self._client.run(["--base-url", url, *arguments, *settings.client_options])

    def _keep(self, run: Run) -> None:
        self._file.add(run)
        self._made.add(run.key)
        self._events.run(run)


def _counters_since(before: Counters | None, url: str, answers: Answers) -> Counters | None:
    info = server_info(url)
    after = plugin_counters(info)
    if before is not None and after is not None:
        return after.since(before)
    # A request's first token is the prefill's and no round's.
    return sglang_counters(info, sum(sample.output_tokens - 1 for sample in answers.samples))
