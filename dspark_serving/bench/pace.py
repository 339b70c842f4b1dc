"""How fast the machine was during a run: what a fixed piece of work took beside it.

The cores of a rented machine share caches, memory and clock with other tenants, and were seen to be half as fast in one
minute as in another. Arms that ran in different minutes are compared more fairly when each run's time is divided by
what the same work took during it; not exactly, since a server's work is not slowed as much as this at every batch size.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self

from dspark_serving.errors import EnvironmentMismatchError
from dspark_serving.server import last_complaint

_PATIENCE = 30.0  # seconds until a first line: torch has to be imported


class Pace:
    """The working process; a context manager that ends it. It runs on the cores that this process may use."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._ticks: list[tuple[float, float]] = []  # when, and CPU seconds

    def __enter__(self) -> Self:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "dspark_serving.bench.pace_process"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()

    def seconds(self, start: float, end: float) -> float:
        """Mean CPU seconds of the work between two times of the monotonic clock, or the next time that it is done.

        Raises:
            EnvironmentMismatchError: the process is gone, or does nothing for half a minute.
        """
        deadline = time.monotonic() + _PATIENCE
        while not self._ticks or self._ticks[-1][0] < start:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise EnvironmentMismatchError(
                    f"the process that measures the machine's pace is gone or stuck: {last_complaint(self._log)}",
                    expected="a line five times a second",
                    fix=f"Its log is {self._log}; or measure without --pace.",
                )
            time.sleep(0.05)
        during = [seconds for when, seconds in self._ticks if start <= when <= end] or [self._ticks[-1][1]]
        return sum(during) / len(during)

    def _read(self) -> None:
        for line in self._process.stdout or ():
            when, seconds = line.split()
            self._ticks.append((float(when), float(seconds)))
