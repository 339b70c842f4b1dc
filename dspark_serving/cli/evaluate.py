"""`dspark evaluate`: what a drafter is worth on the usual benchmarks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dspark_serving.assets.store import checkpoint_name
from dspark_serving.bench.results import ResultFile, Row
from dspark_serving.cli.bench import numbers
from dspark_serving.cli.console import console, one_line_errors, report
from dspark_serving.errors import OptionError

if TYPE_CHECKING:  # torch and transformers take seconds to import: not for every `dspark --help`
    from dspark_training.evaluation.evaluate import Answers, Evaluation
    from dspark_training.evaluation.evaluate import Progress as OnProgress
    from dspark_training.evaluation.records import Record
    from dspark_training.evaluation.subjects import Ask, Subject

_NOTES = (
    "Accepted length: tokens a round over all rounds, bonus token included, the prefill's token not. Intervals: 95 %, "
    "bootstrapped over questions. Tokens a second: of all requests together, prefills included. prompt_lookup: copies "
    "what followed the last equal 3-, 2- or 1-gram, counted on the answers of the first arm."
)


def evaluate(
    drafter: Annotated[
        list[Path] | None, typer.Option(help="A drafter's directory. Repeat to compare several on the same prompts.")
    ] = None,
    target: Annotated[Path | None, typer.Option(help="Checkpoint of the target model, for --drafter.")] = None,
    url: Annotated[
        list[str] | None, typer.Option(help="A running SGLang server with the plugin, instead of --drafter. Repeat.")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="gsm8k, math500, aime25, humaneval, mbpp, livecodebench, mt-bench, alpaca or arena-hard-v2, fetched "
            "by name; NAME=FILE.jsonl; or NAME=DIRECTORY with a local copy. Repeat."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="JSON file; a table and plots are written beside it.")] = Path(
        "evaluation.json"
    ),
    work: Annotated[Path, typer.Option(help="Answers; a second run with the same settings goes on there.")] = Path(
        "runs/evaluate"
    ),
    temperature: Annotated[str, typer.Option(help="A list.")] = "0",
    prompts: Annotated[int, typer.Option(min=0, help="Of a dataset, spread evenly over it; 0 for all.")] = 100,
    turns: Annotated[int, typer.Option(min=1, help="First turns of a conversation that are asked.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Requests decoded together (--drafter).")] = 16,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way (--url).")] = 4,
    dtype: Annotated[str, typer.Option(help="Of the target: bf16 or fp32 (--drafter).")] = "bf16",
    plain: Annotated[bool, typer.Option(help="Also decode without a drafter, for speed and equal texts.")] = False,
    walk: Annotated[
        bool, typer.Option(help="Temperature 0: decode plainly once and count every drafter's rounds on that.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
) -> None:
    """Measure accepted length, acceptance by position, confidence quality and speed by real speculative decoding."""
    with one_line_errors():
        temperatures = numbers("--temperature", temperature)
        _check(drafter, target, url, dataset, temperatures, walk, plain, dtype)

        from dspark_training.evaluation.evaluate import Evaluation
        from dspark_training.evaluation.questions import read_questions

        datasets = dict(read_questions(text, prompts, turns) for text in dataset or [])
        file = ResultFile(output.stem, output)
        with _Bars() as bars:
            name = str(target) if target else "that of the server"
            evaluation = Evaluation(checkpoint_name(name), datasets, temperatures, max_tokens, work, bars.show)
            if url:
                subjects: list[Subject] = _servers(url, concurrency, seed)
            elif target:
                subjects = _local(drafter or [], target, dtype, batch, seed, plain, walk, evaluation)
            answers = {point: {s.name: evaluation.answers(s, point) for s in subjects} for point in evaluation.points}
        rows = evaluation.rows(subjects, answers)
        _write(file, rows, subjects, answers)
        _show(rows)
        report(f"wrote {output}, its table and its plots; answers are in {work}")


def _check(
    drafter: Sequence[Path] | None,
    target: Path | None,
    url: Sequence[str] | None,
    dataset: Sequence[str] | None,
    temperatures: Sequence[float],
    walk: bool,
    plain: bool,
    dtype: str,
) -> None:
    """Refuse combinations of options that mean nothing.

    Raises:
        OptionError: names the first one.
    """
    wrong = {
        "no --dataset": not dataset,
        "neither --drafter with --target nor --url": not url and not (target and (drafter or plain)),
        "both --drafter and --url": bool(url and drafter),
        "--walk with a server or a temperature above 0": walk and (bool(url) or any(t > 0 for t in temperatures)),
        "--plain with a server": plain and bool(url),
        f"--dtype {dtype}": dtype not in ("bf16", "fp32"),
    }
    for found, is_wrong in wrong.items():
        if is_wrong:
            raise OptionError(
                found,
                expected="--dataset, and --target with --drafter, or --url; --walk at temperature 0; bf16 or fp32",
                fix="See `dspark evaluate --help`.",
            )
    names = [text.partition("=")[0] for text in dataset or []]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise OptionError(
            f"two datasets are called {twice}",
            expected="each --dataset by a name of its own",
            fix="Leave one out, or name its file otherwise: --dataset NAME=FILE.jsonl.",
        )


def _local(
    drafters: Sequence[Path],
    target_path: Path,
    dtype: str,
    batch: int,
    seed: int,
    plain: bool,
    walk: bool,
    evaluation: Evaluation,
) -> list[Subject]:
    import torch
    from dspark_training.evaluation.subjects import PLAIN, LocalSubject, WalkSubject, load_drafter
    from dspark_training.target import Target

    target = Target.load(target_path, torch.bfloat16 if dtype == "bf16" else torch.float32)
    off = LocalSubject(PLAIN, target, None, batch_size=batch, seed=seed)
    subjects: list[Subject] = [off] if plain or walk else []
    names = _distinct_names([checkpoint_name(path) for path in drafters])
    for name, path in zip(names, drafters, strict=True):
        loaded = load_drafter(path, target, target_path)
        if walk:
            subjects.append(WalkSubject(name, target, loaded, _greedy_answers(evaluation, off)))
        else:
            subjects.append(LocalSubject(name, target, loaded, batch_size=batch, seed=seed))
    return subjects


def _greedy_answers(evaluation: Evaluation, off: Subject) -> Callable[[Ask], Record]:
    @cache
    def greedy() -> dict[tuple[str, int], Record]:
        return {(r.question, r.turn): r for point in evaluation.points for r in evaluation.answers(off, point)}

    return lambda ask: greedy()[ask.question.key, ask.turn]


def _servers(urls: Sequence[str], concurrency: int, seed: int) -> list[Subject]:
    from dspark_training.evaluation.live import LiveSubject

    names = [re.sub(r"^https?://", "", url) for url in urls]
    return [LiveSubject(n, url, concurrency=concurrency, seed=seed) for n, url in zip(names, urls, strict=True)]


def _write(file: ResultFile, rows: list[Row], subjects: Sequence[Subject], answers: Answers) -> None:
    from dspark_training.evaluation.figures import labels_of
    from dspark_training.evaluation.report import markdown, plot_lengths

    from dspark_serving.recording.labels import plot_reliability

    file.write(rows, _NOTES)
    file.path.with_suffix(".md").write_text(markdown(file.name, rows, _NOTES))
    plot_lengths(rows, file.path.with_suffix(".png"))
    for subject in subjects:
        for temperature in sorted({point.temperature for point in answers}):
            here = [named[subject.name] for point, named in answers.items() if point.temperature == temperature]
            labels = labels_of(record for records in here for record in records)
            if labels is not None:
                name = f"{file.path.stem}_{subject.name}_t{temperature:g}_reliability.png"
                plot_reliability(file.path.with_name(name), labels, subject.calibration)


def _show(rows: Sequence[Row]) -> None:
    from dspark_training.evaluation.report import difference_table, length_table, quality_table

    for title, (header, lines) in {
        "accepted length, bonus token included": length_table(rows),
        "differences on the same questions": difference_table(rows),
        "confidence: survival up to each position": quality_table(rows),
    }.items():
        if lines:
            table = Table(*header, title=title)
            for line in lines:
                table.add_row(*line)
            console.print(table)


def _distinct_names(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(names, start=1)]


class _Bars(Progress):
    """A bar for each subject, dataset and temperature."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        super().__init__(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._bars: dict[str, Any] = {}

    @property
    def show(self) -> OnProgress:
        return self._show

    def _show(self, what: str, done: int, total: int) -> None:
        if what not in self._bars:
            self._bars[what] = self.add_task(what, total=total)
        self.update(self._bars[what], completed=done)
