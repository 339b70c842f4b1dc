"""First figures of the served drafter: `python -m benchmarks.first_light` (issue 2, point 7).

The servers of all arms are up at the same time and one of them is asked at a time: a sleeping server costs memory, not
cores, and arms that take turns within minutes see the same machine.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple, cast

import typer

from benchmarks.load import DATASETS, flush_cache, read_prompts, run_load, server_report
from benchmarks.report import markdown, plot_throughput
from benchmarks.results import ResultFile, Row
from benchmarks.summary import Context, Run, run_row, summary_row
from dspark_serving.assets import Dtype, ensure_smollm2, shipped_bundle
from dspark_serving.assets.store import cache_root
from dspark_serving.cli.console import one_line_errors, report
from dspark_serving.config import flag
from dspark_serving.drafters import read_spec
from dspark_serving.errors import OptionError
from dspark_serving.metrics import WINDOW
from dspark_serving.server import running_server

BASELINE = "off"
_RESULT = Path(__file__).parent / "results" / "first_light.json"


class Arm(NamedTuple):
    """A server to measure."""

    options: tuple[str, ...]
    family: str | None = None  # of what drafts; None without speculation


class Point(NamedTuple):
    """One run to make; its prompts depend on nothing but the dataset."""

    concurrency: int
    repetition: int
    dataset: str
    arm: str


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    arms: tuple[str, ...]
    concurrencies: tuple[int, ...]
    repetitions: int
    prompts: int
    max_tokens: int


def arms_of(drafter: Path) -> dict[str, Arm]:
    """Every arm that can be measured."""
    dspark = ("--speculative-algorithm", "dspark", "--speculative-draft-model-path", str(drafter))
    ngram = ("--speculative-algorithm", "NGRAM", "--speculative-ngram-max-bfs-breadth", "1")  # a chain, as ours
    as_many = ("--speculative-num-draft-tokens", str(read_spec(drafter).gamma + 1))  # tokens a round as ours
    return {
        BASELINE: Arm((*dspark, flag("disable"))),  # SGLang as published, without speculation
        "plain": Arm(()),  # without speculation too, on this plugin's CPU parts
        "dspark": Arm((*dspark, flag("policy"), "full"), "dspark"),
        "threshold": Arm((*dspark, flag("policy"), "threshold"), "dspark"),
        "ngram": Arm((*ngram, *as_many), "ngram"),
    }


def schedule(settings: Settings) -> Iterator[Point]:
    """Every run in the order in which it is made: arms take turns, and another one begins each time."""
    turn = 0
    for concurrency in settings.concurrencies:
        for repetition in range(settings.repetitions):
            for dataset in DATASETS:
                first = turn % len(settings.arms)
                for arm in settings.arms[first:] + settings.arms[:first]:
                    yield Point(concurrency, repetition, dataset, arm)
                turn += 1


def rows_of(contexts: Mapping[str, Context], runs: Sequence[Run]) -> list[Row]:
    """A row a run, and behind them a summary row for each dataset, concurrency and arm, which all must have runs."""
    baseline = {(r.dataset, r.concurrency, r.repetition): r for r in runs if r.arm == BASELINE}
    rows = [run_row(contexts[run.arm], run, baseline[run.dataset, run.concurrency, run.repetition]) for run in runs]
    # In the order of their first runs: dict keys keep it.
    datasets, concurrencies, arms = (
        dict.fromkeys(getattr(run, name) for run in runs) for name in ("dataset", "concurrency", "arm")
    )
    for dataset, concurrency, arm in product(datasets, concurrencies, arms):
        group = [r for r in runs if (r.dataset, r.concurrency, r.arm) == (dataset, concurrency, arm)]
        off = [baseline[dataset, concurrency, run.repetition] for run in group]
        rows.append(summary_row(contexts[arm], group, off))
    return rows


def phase_rows(arm: str, concurrency: int, before: Row, after: Row) -> list[Row]:
    """Mean seconds of each phase of a round, when the server's averaging window saw this concurrency only."""
    rounds = after.get("rounds", 0) - before.get("rounds", 0)
    if rounds < WINDOW:
        return []
    return [
        {"arm": arm, "concurrency": concurrency, "rounds": WINDOW, "phase": phase, "seconds": seconds}
        for phase, seconds in after["phase_seconds"].items()
    ]


class Bench:
    """Servers that are up, and what they were measured at so far."""

    def __init__(self, urls: Mapping[str, str], settings: Settings) -> None:
        self._urls = urls
        self._settings = settings
        self._prompts = {dataset: read_prompts(dataset, settings.prompts) for dataset in DATASETS}
        self.runs: list[Run] = []
        self.phases: list[Row] = []

    def warm_up(self) -> None:
        """Let every server pay its first-time costs, of every batch size, before anything is measured."""
        for url in self._urls.values():
            for concurrency in self._settings.concurrencies:
                run_load(url, self._prompts["chat"][:concurrency], concurrency=concurrency, max_tokens=8)

    def measure(self, concurrency: int) -> None:
        """Make all runs of one concurrency."""
        before = {arm: server_report(url) for arm, url in self._urls.items()}
        for point in schedule(self._settings):
            if point.concurrency == concurrency:
                self._run(point)
        for arm, url in self._urls.items():
            self.phases += phase_rows(arm, concurrency, before[arm], server_report(url))

    def _run(self, point: Point) -> None:
        flush_cache(self._urls[point.arm])
        samples = run_load(
            self._urls[point.arm],
            self._prompts[point.dataset],
            concurrency=point.concurrency,
            max_tokens=self._settings.max_tokens,
        )
        run = Run(point.arm, point.dataset, point.concurrency, point.repetition, samples)
        self.runs.append(run)
        speed = sum(s.output_tokens for s in samples) / run.seconds
        report(f"{point.dataset} x{point.concurrency} #{point.repetition} {point.arm}: {speed:.1f} tokens/s")


def main(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each dataset.")] = 16,
    concurrency: Annotated[str, typer.Option(help="Requests under way, a list.")] = "1,2,4,8",
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each point.")] = 2,
    arms: Annotated[str, typer.Option(help="A list of: off, plain, dspark, threshold, ngram.")] = (
        "off,plain,dspark,ngram"
    ),
    max_tokens: Annotated[int, typer.Option(min=2, help="Length at which an answer is cut.")] = 128,
    dtype: Annotated[str, typer.Option(help="Of the target: bf16 or fp32.")] = "bf16",
    bundle: Annotated[Path | None, typer.Option(help="A drafter; by default the shipped one.")] = None,
    output: Annotated[Path, typer.Option(help="JSON file; a table and a plot are written beside it.")] = _RESULT,
) -> None:
    """Measure tokens a second and accepted length with and without speculation, arms interleaved."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, which ends the servers
    with one_line_errors():
        drafter = bundle or shipped_bundle()
        known = arms_of(drafter)
        settings = Settings(
            arms=tuple(_listed("--arms", arms, set(known))),
            concurrencies=tuple(int(c) for c in _listed("--concurrency", concurrency, {str(c) for c in range(1, 17)})),
            repetitions=repetitions,
            prompts=prompts,
            max_tokens=max_tokens,
        )
        if BASELINE not in settings.arms:
            raise OptionError(f"--arms {arms}", expected=f"{BASELINE} among them", fix="Ratios need it; add it.")
        (precision,) = _listed("--dtype", dtype, {"bf16", "fp32"})
        target = ensure_smollm2(cast(Dtype, precision), report=report)
        chosen = {arm: known[arm] for arm in settings.arms}
        contexts = {
            name: Context(
                target=f"smollm2-135m-instruct {precision}",
                drafter=drafter.name if arm.family == "dspark" else None,
                family=arm.family,
                temperature=0.0,
            )
            for name, arm in chosen.items()
        }
        _measure(target, chosen, settings, contexts, output)


def _measure(
    target: Path, arms: Mapping[str, Arm], settings: Settings, contexts: Mapping[str, Context], output: Path
) -> None:
    file = ResultFile("first_light", output)
    with ExitStack() as servers:
        urls = {}
        for name, arm in arms.items():
            log = cache_root() / "logs" / f"first-light-{name}.log"
            report(f"starting the server of {name} (log: {log})")
            urls[name] = servers.enter_context(running_server(target, arm.options, log=log)).url
        bench = Bench(urls, settings)
        report("warming up")
        bench.warm_up()
        for concurrency in settings.concurrencies:
            bench.measure(concurrency)
            # After every concurrency, so that an interrupted measurement leaves what it has.
            _write(file, rows_of(contexts, bench.runs) + bench.phases, settings)


def _write(file: ResultFile, rows: list[Row], settings: Settings) -> None:
    notes = (
        f"Greedy, {settings.prompts} prompts a dataset, answers cut at {settings.max_tokens} tokens, "
        f"{settings.repetitions} repetitions, arms interleaved, caches emptied before every run. `off` is SGLang's own "
        "decoding, `plain` the same without speculation on this plugin's CPU parts. Accepted lengths include the bonus "
        "token. Intervals are bootstrapped over prompts. Phases: mean over a server's last "
        f"{WINDOW} rounds at that concurrency, all datasets; none where there were fewer."
    )
    file.write(rows, notes)
    file.path.with_suffix(".md").write_text(markdown("First light", rows, notes))
    plot_throughput(rows, file.path.with_suffix(".png"))
    report(f"wrote {file.path}")


def _listed(option: str, text: str, allowed: set[str]) -> list[str]:
    """The comma-separated values of an option, each once.

    Raises:
        OptionError: one is not among the allowed.
    """
    values = list(dict.fromkeys(text.split(",")))
    for value in values:
        if value not in allowed:
            raise OptionError(
                f"{option} {text} names {value!r}",
                expected=f"a list of {', '.join(sorted(allowed))}",
                fix="Separate the values by commas.",
            )
    return values


if __name__ == "__main__":
    typer.run(main)
