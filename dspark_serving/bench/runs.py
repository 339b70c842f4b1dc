"""Finished runs and the file that keeps them while a sweep is under way: JSON lines, a header and then a run a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dspark_serving.bench.client import Sample
from dspark_serving.bench.plan import RunKey, Settings
from dspark_serving.bench.server_api import Counters
from dspark_serving.errors import DataError


@dataclass(frozen=True)
class Run:
    """All requests of a point, sent once to one arm."""

    key: RunKey
    seconds: float  # from the first request to the last answer
    samples: tuple[Sample, ...]
    counters: Counters | None  # of this run; None without speculation
    pace_seconds: float | None = None  # CPU time of a fixed piece of work, mean over this run; None: not measured

    @property
    def output_tokens(self) -> int:
        """Of all answers."""
        return sum(sample.output_tokens for sample in self.samples)


_RUN = TypeAdapter(Run)
_NOT_MEASURED = {"repetitions", "time_limit", "candidate", "rivals", "ttft_seconds", "tpot_seconds"}


class RunFile:
    """Runs on disk; a sweep that was cut short goes on from here.

    Raises:
        DataError: the file holds runs of other settings, or is damaged.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path = path
        header = _header(settings)
        self.resumed = path.exists()
        if self.resumed:
            self.runs = self._read(header)
        else:
            self.runs = []
            path.parent.mkdir(parents=True, exist_ok=True)
        # Written again, because the last line of an interrupted sweep may be half a line.
        lines = [json.dumps(header), *(_RUN.dump_json(run).decode() for run in self.runs)]
        path.write_text("".join(line + "\n" for line in lines))

    def add(self, run: Run) -> None:
        """Keep a run."""
        self.runs.append(run)
        with self._path.open("a") as file:
            file.write(_RUN.dump_json(run).decode() + "\n")

    def remove(self) -> None:
        """The sweep is complete, and its result written."""
        self._path.unlink()

    def _read(self, header: dict[str, Any]) -> list[Run]:
        whole, _, _ = self._path.read_text().rpartition("\n")
        first, *lines = whole.split("\n")
        fix = f"Delete {self._path} to begin anew."
        try:
            found = json.loads(first)
            runs = [_RUN.validate_json(line) for line in lines]
        except (ValueError, ValidationError) as error:
            raise DataError(f"{self._path} is damaged ({error})", expected="the runs of a sweep", fix=fix) from error
        if found != header:
            differing = sorted(name for name in header if found.get(name) != header[name])
            raise DataError(
                f"{self._path} holds runs with other settings ({', '.join(differing)})",
                expected="those of this sweep, to go on from",
                fix=f"Use them again, or: {fix[0].lower()}{fix[1:]}",
            )
        return runs


def _header(settings: Settings) -> dict[str, Any]:
    """Everything that a run's figures depend on; how many there are and how they are judged may change."""
    return {name: repr(value) for name, value in vars(settings).items() if name not in _NOT_MEASURED}
