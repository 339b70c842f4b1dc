"""`dspark bench`: an A/B load test of policies and servers."""

from __future__ import annotations

import shlex
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dspark_serving.assets.store import cache_root
from dspark_serving.bench.arms import Attached, Host, Launched, parse_arm
from dspark_serving.bench.client import LoadClient
from dspark_serving.bench.outcome import missing, missing_runs, write_outcome
from dspark_serving.bench.pace import Pace
from dspark_serving.bench.plan import RunKey, Settings, planned_seconds
from dspark_serving.bench.results import ResultFile
from dspark_serving.bench.runs import Run, RunFile
from dspark_serving.bench.sweep import Events, Sweep
from dspark_serving.bench.workload import Dataset, Load, Shape, expected_seconds
from dspark_serving.cli.console import console, one_line_errors, report
from dspark_serving.errors import OptionError


def bench(
    arm: Annotated[
        list[str],
        typer.Option(
            help="NAME=policy:POLICY[:THRESHOLD] of the shared server (--url, or --model and --server), "
            "NAME=url:URL, or NAME=server:OPTIONS of a server of its own. Repeat."
        ),
    ],
    dataset: Annotated[
        list[str], typer.Option(help="NAME=FILE of JSON lines with a `prompt`, or a dataset name of SGLang. Repeat.")
    ],
    output: Annotated[Path, typer.Option(help="JSON file; a table and a plot are written beside it.")],
    url: Annotated[str | None, typer.Option(help="Running server whose policy is switched.")] = None,
    model: Annotated[Path | None, typer.Option(help="Target of the servers that are launched.")] = None,
    server: Annotated[str | None, typer.Option(help="Options of a launched server, its policy switched.")] = None,
    concurrency: Annotated[str | None, typer.Option(help="Requests under way, a list.")] = None,
    request_rate: Annotated[str | None, typer.Option(help="Requests a second instead, a list.")] = None,
    temperature: Annotated[str, typer.Option(help="A list.")] = "0",
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each point and arm.")] = 3,
    prompts: Annotated[int, typer.Option(min=1, help="Of a run, at least; never fewer than the concurrency.")] = 16,
    waves: Annotated[
        int, typer.Option(min=1, help="Requests of a run by concurrency, at least, as far as prompts go.")
    ] = 2,
    max_tokens: Annotated[int, typer.Option(min=4, help="Tokens of an answer, in the mean.")] = 128,
    stop_at_eos: Annotated[bool, typer.Option(help="Answers may end early; arms then do unequal work.")] = False,
    baseline: Annotated[str | None, typer.Option(help="Arm that ratios refer to; by default `off`.")] = None,
    candidate: Annotated[str | None, typer.Option(help="Arm that the verdict is about; by default the last.")] = None,
    ttft_ms: Annotated[float | None, typer.Option(min=0, help="Limit of a good request's first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(min=0, help="Limit of a good request's mean time a token.")] = None,
    together: Annotated[bool, typer.Option(help="All launched servers up at once, taking turns (memory).")] = False,
    time_limit: Annotated[float | None, typer.Option(min=0, help="Seconds after which no further turn begins.")] = None,
    pace: Annotated[bool, typer.Option("--pace", help="Also compare at equal pace of an unsteady machine.")] = False,
    seed: Annotated[int, typer.Option(help="Of the client: prompts it makes, arrival times.")] = 0,
    client_options: Annotated[str, typer.Option(help="Further options of sglang.benchmark.serving.")] = "",
) -> None:
    """Compare arms under load: same prompts in the same order, interleaved repetitions, intervals, a verdict.

    A sweep that was interrupted leaves a valid result and goes on where it was when the command is given again.
    """
    with one_line_errors():
        arms = tuple(parse_arm(text, _shared_host(url, model, server), model) for text in arm)
        names = [a.name for a in arms]
        chosen = candidate or names[-1]
        settings = Settings(
            target=model.name if model else url or "that of the arms' servers",
            arms=arms,
            datasets=tuple(_dataset(text) for text in dataset),
            temperatures=tuple(numbers("--temperature", temperature)),
            loads=_loads(concurrency, request_rate),
            shape=Shape(prompts, max_tokens, not stop_at_eos, waves),
            repetitions=repetitions,
            baseline=baseline or ("off" if "off" in names else None),
            candidate=chosen if len(names) > 1 else None,
            rivals=tuple(name for name in names if name != chosen),
            ttft_seconds=None if ttft_ms is None else ttft_ms / 1000,
            tpot_seconds=None if tpot_ms is None else tpot_ms / 1000,
            seed=seed,
            together=together,
            client_options=tuple(shlex.split(client_options)),
            time_limit=time_limit,
            pace=pace,
        )
        measure(output.stem, settings, output)


def measure(name: str, settings: Settings, output: Path, notes: str = "") -> None:
    """Make the runs of a sweep that are not made yet, show how it goes, and write the result whatever happens.

    Raises:
        DsparkError: a server or the client fails, or the runs of an earlier sweep at this place have other settings.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, which ends the servers
    file = ResultFile(name, output)
    runs = RunFile(output.with_suffix(".runs.jsonl"), settings)
    if runs.runs:
        report(f"going on after {len(runs.runs)} runs")
    logs = cache_root() / "logs"
    try:
        with ExitStack() as stack:
            pace = stack.enter_context(Pace(logs / "bench-pace.log")) if settings.pace else None
            client = stack.enter_context(LoadClient(logs / "bench-client.log"))
            display = stack.enter_context(_Display(settings, runs.runs))
            Sweep(settings, client, runs, Events(report, display.show), logs, pace).measure()
    finally:
        if runs.runs:
            _conclude(settings, runs, file, notes)
        if not missing_runs(settings, runs.runs):
            runs.remove()


def _conclude(settings: Settings, runs: RunFile, file: ResultFile, notes: str) -> None:
    said = write_outcome(settings, runs.runs, file, notes)
    if said:
        console.print(Markdown(said))
    report(f"wrote {file.path}, its table and its plot")
    if cut := missing(settings, runs.runs):
        report(f"{cut} The same command goes on from there.")


def announce(settings: Settings) -> None:
    """Say how long a sweep takes on the machine that `expected_seconds` is about."""
    runs = len(missing_runs(settings, []))
    minutes = planned_seconds(settings) / 60
    report(f"{runs} runs, about {minutes:.0f} minutes on two CPU cores without gains from speculation")


def numbers(option: str, text: str) -> list[float]:
    """The comma-separated numbers of an option.

    Raises:
        OptionError: one is no number, or is negative.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value < float("inf") for value in values):
        raise OptionError(f"{option} {text}", expected="numbers of at least 0", fix="Separate them by commas.")
    return values


def concurrencies(text: str) -> tuple[Load, ...]:
    """The loads of a list of numbers of requests under way.

    Raises:
        OptionError: one is no whole number of at least 1.
    """
    values = numbers("--concurrency", text)
    if not all(value >= 1 and value.is_integer() for value in values):
        raise OptionError(f"--concurrency {text}", expected="whole numbers of at least 1", fix="Correct the list.")
    return tuple(Load(concurrency=int(value)) for value in values)


class _Display(Progress):
    """A bar in expected seconds, so that slow runs count for more."""

    def __init__(self, settings: Settings, made: list[Run]) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(*columns, TextColumn("{task.fields[note]}"), console=console)
        self._settings = settings
        total = sum(self._weight(key) for key in missing_runs(settings, made))
        self._bar = self.add_task("runs", total=total, note="")

    def show(self, run: Run) -> None:
        """Count a run that has been made."""
        speed = run.output_tokens / run.seconds
        where = f"{run.key.point} #{run.key.repetition} {run.key.arm}"
        self.update(self._bar, advance=self._weight(run.key), note=f"{where}: {speed:.1f} tokens/s")

    def _weight(self, key: RunKey) -> float:
        return expected_seconds(key.point.load, self._settings.shape)


def _shared_host(url: str | None, model: Path | None, server: str | None) -> Host | None:
    if url is not None and server is not None:
        raise OptionError("--url and --server are both given", expected="one of them", fix="Leave one out.")
    if url is not None:
        return Attached(url.rstrip("/"))
    if server is None:
        return None
    if model is None:
        raise OptionError("--server has no target", expected="--model", fix="Name the target with --model.")
    return Launched(model, tuple(shlex.split(server)))


def _dataset(text: str) -> Dataset:
    name, _, path = text.partition("=")
    return Dataset(name, Path(path) if path else None)


def _loads(concurrency: str | None, request_rate: str | None) -> tuple[Load, ...]:
    if (concurrency is None) == (request_rate is None):
        fix = "For example --concurrency 1,4,16."
        raise OptionError("the load is not clear", expected="either --concurrency or --request-rate", fix=fix)
    if concurrency is not None:
        return concurrencies(concurrency)
    rates = numbers("--request-rate", request_rate or "")
    if 0 in rates:
        raise OptionError(f"--request-rate {request_rate}", expected="rates above 0", fix="Correct the list.")
    return tuple(Load(request_rate=rate) for rate in rates)
