"""Which runs a sweep makes, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from dspark_serving.bench.arms import Arm, Host
from dspark_serving.bench.workload import Dataset, Load, Shape, expected_seconds
from dspark_serving.errors import OptionError


class Point(NamedTuple):
    """Where arms are compared."""

    dataset: str
    temperature: float
    load: Load

    def __str__(self) -> str:
        return f"{self.dataset} T={self.temperature:g} {self.load}"


class RunKey(NamedTuple):
    """One run of one arm."""

    point: Point
    repetition: int
    arm: str


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Raises:
        OptionError: a list is empty or names something twice, or the baseline or the candidate is no arm.
    """

    target: str
    arms: tuple[Arm, ...]
    datasets: tuple[Dataset, ...]
    temperatures: tuple[float, ...]
    loads: tuple[Load, ...]
    shape: Shape
    repetitions: int
    baseline: str | None  # the arm without speculation that texts and throughputs are compared with
    candidate: str | None  # the arm that the verdict is about
    rivals: tuple[str, ...] = ()  # what the candidate is compared with
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    seed: int = 0
    together: bool = False  # launched servers are all up at once, so that all arms take turns
    client_options: tuple[str, ...] = ()
    time_limit: float | None = None  # seconds
    pace: bool = False  # a fixed piece of work beside each run tells how fast the machine was

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        _once("arm", names)
        _once("dataset", [dataset.name for dataset in self.datasets])
        _once("temperature", self.temperatures)
        _once("load", self.loads)
        for name in (self.baseline, self.candidate, *self.rivals):
            if name is not None and name not in names:
                raise OptionError(
                    f"there is no arm {name!r}", expected=f"one of {', '.join(names)}", fix="Add the arm."
                )

    @property
    def points(self) -> list[Point]:
        """All points; the loads of one dataset and temperature follow each other."""
        names = [dataset.name for dataset in self.datasets]
        return [Point(*each) for each in product(names, self.temperatures, self.loads)]

    @property
    def sessions(self) -> list[dict[Host, list[Arm]]]:
        """The arms by host; hosts of one session are up at the same time."""
        hosts: dict[Host, list[Arm]] = {}
        for arm in self.arms:
            hosts.setdefault(arm.host, []).append(arm)
        return [hosts] if self.together else [{host: arms} for host, arms in hosts.items()]


def turns(settings: Settings, arms: list[Arm]) -> Iterator[list[RunKey]]:
    """The runs of `arms`: in a turn each runs one point once, and another arm begins each time.

    Repetitions are the outer loop: they are far apart in time, and a sweep that is cut short has every point once.
    """
    turn = 0
    for repetition in range(settings.repetitions):
        for point in settings.points:
            able = [arm.name for arm in arms if point.temperature == 0 or not arm.greedy_only]
            first = turn % len(able) if able else 0
            yield [RunKey(point, repetition, name) for name in able[first:] + able[:first]]
            turn += 1


def all_runs(settings: Settings) -> list[RunKey]:
    """Every run in the order in which it is made."""
    return [
        key
        for session in settings.sessions
        for turn in turns(settings, [arm for arms in session.values() for arm in arms])
        for key in turn
    ]


def planned_seconds(settings: Settings) -> float:
    """A rough duration of all runs, see `expected_seconds`."""
    return sum(expected_seconds(key.point.load, settings.shape) for key in all_runs(settings))


def _once(what: str, values: list[str] | tuple[float, ...] | tuple[Load, ...]) -> None:
    if not values:
        raise OptionError(f"there is no {what}", expected="one at least", fix=f"Name a {what}.")
    for value in values:
        if list(values).count(value) > 1:
            raise OptionError(f"the {what} {value} is named twice", expected="once", fix="Remove one.")
