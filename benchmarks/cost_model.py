"""How well round times are predicted, at start-up and after a minute: `python -m benchmarks.cost_model` (issue 3).

A server with the scheduler under changing load, recorded by its own flight recorder. `start` predicts the recorded
rounds with the start-up profile alone; `online` is what the scheduler had planned with when each round ran.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Annotated, NamedTuple

import httpx
import typer

from benchmarks.subjects import DATASETS, dspark_options
from dspark_serving.assets import ensure_smollm2, shipped_bundle
from dspark_serving.bench.results import ResultFile, Row
from dspark_serving.cli.console import one_line_errors, report
from dspark_serving.errors import DataError
from dspark_serving.recording import Recording, read_recording
from dspark_serving.scheduler.cost import CostModel
from dspark_serving.scheduler.round import Outcome
from dspark_serving.server import Server, running_server

_RESULT = Path(__file__).parent / "results" / "cost_model.json"
_MINUTE = 60.0
_WRITING = 30.0  # seconds that a recording may take to appear


class Error(NamedTuple):
    """One steady round."""

    phase: str
    requests: int
    drafted: bool
    relative: float  # |predicted - measured| / measured


def main(
    concurrency: Annotated[
        str, typer.Option(help="Requests under way, a list; each load comes twice.")
    ] = "1,4,16,32,8,2",
    seconds: Annotated[float, typer.Option(min=1, help="Of each load.")] = 12.0,
    max_tokens: Annotated[int, typer.Option(min=4, help="Tokens of an answer.")] = 64,
    bundle: Annotated[Path | None, typer.Option(help="A drafter; by default the shipped one.")] = None,
    output: Annotated[Path, typer.Option(help="JSON file; a table is written beside it.")] = _RESULT,
) -> None:
    """Measure the error of predicted round times."""
    with one_line_errors():
        loads = [int(text) for text in concurrency.split(",")]
        result = ResultFile("cost_model", output)
        drafter = bundle or shipped_bundle()
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            options = [*dspark_options(drafter), "--max-running-requests", str(max(loads))]
            options += ["--dspark-recording", str(folder)]
            target = ensure_smollm2("bf16", report=report)
            with running_server(target, options, log=output.with_suffix(".log")) as server:
                start = time.monotonic()
                for load in loads * 2:
                    _load(server, load, seconds, max_tokens)
                spent = time.monotonic() - start
                httpx.post(f"{server.url}/dspark/recording", timeout=60.0, trust_env=False).raise_for_status()
                recording = read_recording(_written(folder))
        rows = rows_of(recording, skip_seconds=_MINUTE, spent=spent)
        notes = (
            f"Steady rounds after the first minute of {spent:.0f} s; prompts of GSM8K, HumanEval and chat in turn, "
            "greedy. `start` is the start-up profile alone, `online` what the scheduler planned the round with."
        )
        result.write(rows, notes)
        output.with_suffix(".md").write_text(table(rows, notes))
        report(table(rows, notes))


def _written(folder: Path) -> Path:
    """The recording, once it is complete."""
    deadline = time.monotonic() + _WRITING
    while not (found := list(folder.glob("*.npz"))):
        if time.monotonic() > deadline:
            raise DataError(f"no recording in {folder}", expected="one on demand", fix="See the server's log.")
        time.sleep(0.1)
    return found[0]


def _load(server: Server, concurrency: int, seconds: float, max_tokens: int) -> None:
    """Keep `concurrency` requests under way for some seconds."""
    files = [dataset.path for dataset in DATASETS.values() if dataset.path is not None]
    prompts = cycle(zip(*([json.loads(line)["prompt"] for line in path.open()] for path in files), strict=False))
    deadline = time.monotonic() + seconds

    def ask(texts: Iterator[str]) -> None:
        for text in texts:
            if time.monotonic() > deadline:
                return
            server.chat(text, max_tokens=max_tokens)

    streams = [cycle(next(prompts)) for _ in range(concurrency)]
    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(ask, streams))


def rows_of(recording: Recording, *, skip_seconds: float, spent: float) -> list[Row]:
    """Median relative errors by phase: over all, by kind of round and by load."""
    header = recording.header
    profiled = CostModel.fit(header.cost_samples, header.cost_tiers)
    outcomes = [kept.outcome for kept in recording.rounds if kept.outcome.steady]
    outcomes = outcomes[int(len(outcomes) * min(skip_seconds / spent, 0.5)) :]
    errors = [error for outcome in outcomes for error in _errors(outcome, profiled)]
    rows: list[Row] = []
    for phase in ("start", "online"):
        part = [error for error in errors if error.phase == phase]
        rows.append(_row(phase, part))
        for requests in sorted({error.requests for error in part}):
            for drafted in (False, True):
                chosen = [e for e in part if e.requests == requests and e.drafted == drafted]
                if len(chosen) >= 10:
                    rows.append(_row(phase, chosen) | {"concurrency": requests, "drafted": drafted})
    return rows


def _errors(outcome: Outcome, profiled: CostModel) -> Iterator[Error]:
    batch, plan = outcome.batch, outcome.plan
    context = int(batch.context_R.sum())
    tokens = int(outcome.verify_lens_R.sum())
    start = profiled.seconds(batch.requests, tokens, context, plan.drafts, batch.sampled)
    for phase, predicted in (("start", start), ("online", plan.expected_seconds)):
        if predicted == predicted:  # not nan
            yield Error(phase, batch.requests, plan.drafts, abs(predicted - outcome.seconds) / outcome.seconds)


def _row(phase: str, errors: list[Error]) -> Row:
    return {
        "phase": phase,
        "concurrency": None,
        "drafted": None,
        "rounds": len(errors),
        "median_relative_error": statistics.median(e.relative for e in errors) if errors else None,
    }


def table(rows: list[Row], notes: str) -> str:
    """Markdown."""
    lines = ["# Predicted against measured round times", "", notes, ""]
    lines += ["| phase | requests | rounds with drafts | rounds | median relative error |", "|---|---|---|---|---|"]
    for row in rows:
        drafted = "all" if row["drafted"] is None else ("yes" if row["drafted"] else "no")
        error = row["median_relative_error"]
        shown = "" if error is None else f"{100 * error:.1f} %"
        lines.append(f"| {row['phase']} | {row['concurrency'] or 'all'} | {drafted} | {row['rounds']} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
