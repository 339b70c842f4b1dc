"""`dspark data`: prompts, answers, tokens, and what is in them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dspark_serving.cli.console import console, one_line_errors, report
from dspark_serving.errors import OptionError

if TYPE_CHECKING:
    from dspark_training.data.stats import Stats

data_app = typer.Typer(no_args_is_help=True, help="Training data: prompts, the target's answers, tokens.")

_Target = Annotated[Path, typer.Option(help="Checkpoint of the target model.")]
_Out = Annotated[Path, typer.Option(help="What is written.")]
_Seed = Annotated[int, typer.Option(help="Of everything random.")]
_BatchSize = Annotated[int, typer.Option(min=1, help="Sequences generated at once.")]


@data_app.command()
def prompts(
    seeds: Annotated[Path, typer.Argument(help='JSON: domain -> {"openings": [...], "topics": [...]}.')],
    target: _Target,
    out: _Out,
    count: Annotated[list[str], typer.Option(help="DOMAIN=NUMBER of messages to write; repeat it.")],
    seed: _Seed = 7,
    batch_size: _BatchSize = 96,
) -> None:
    """Let the target write prompts; a second run goes on where the first stopped."""
    with one_line_errors():
        from dspark_training.data.written import read_seeds, write_prompts
        from dspark_training.target import Target

        wanted = _counts(count)
        kinds = read_seeds(seeds)
        with _progress("prompts") as progress:
            found = write_prompts(
                Target.load(target), kinds, wanted, out, seed=seed, batch_size=batch_size, progress=progress
            )
        report(f"{len(found)} prompts of {sum(wanted.values())} attempts in {out}")


@data_app.command()
def code_prompts(
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Python sources.")],
    out: _Out,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts at most, drawn at random.")] = None,
    seed: _Seed = 7,
) -> None:
    """Make prompts "complete this function" from the documented functions of Python sources; mind their licence."""
    with one_line_errors():
        from dspark_training.data.code_prompts import code_prompts as make
        from dspark_training.data.prompts import save_prompts
        from dspark_training.data.skipped import Skipped

        skipped = Skipped(out.with_suffix(".skipped.jsonl"))
        found = make(directory, skipped, limit=limit, seed=seed)
        save_prompts(out, found)
        _report(f"{len(found)} prompts in {out}", skipped.summary())


@data_app.command()
def answers(
    sources: Annotated[list[str], typer.Argument(help="JSONL files, or datasets by path or NAME[@SPLIT].")],
    target: _Target,
    out: _Out,
    server: Annotated[str | None, typer.Option(help="OpenAI-compatible URL; without it the target runs here.")] = None,
    model: Annotated[str | None, typer.Option(help="Its name on the server; default: the first there.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to the server at once.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to read of each source.")] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Prompts to answer, drawn at random.")] = None,
    greedy_share: Annotated[float, typer.Option(min=0, max=1, help="Share answered greedily.")] = 0.75,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the other answers.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Nucleus of the server's answers.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longer answers are cut.")] = 256,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are skipped.")] = 512,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="For the template; default: as it is.")
    ] = None,
    batch_size: _BatchSize = 96,
    seed: _Seed = 7,
) -> None:
    """Let the target answer; a second run goes on where the first stopped. The server's key is in OPENAI_API_KEY."""
    with one_line_errors():
        from dspark_training.data.answers import answer
        from dspark_training.data.chat import ChatTemplate
        from dspark_training.data.prompts import read_prompts
        from dspark_training.data.remote import Server, answer_remotely
        from dspark_training.data.skipped import Skipped
        from dspark_training.target import Target

        if server is None and (top_p != 1 or model is not None):
            raise OptionError("--top-p and --model without --server", expected="--server URL", fix="Leave them out.")
        skipped = Skipped(out.with_suffix(".rows.skipped.jsonl"))
        asked = [prompt for source in sources for prompt in read_prompts(source, skipped, limit)]
        with _progress("answers") as progress:
            if server is None:
                store = answer(
                    Target.load(target),
                    asked,
                    out,
                    greedy_share=greedy_share,
                    temperature=temperature,
                    max_new_tokens=max_new_tokens,
                    max_prompt_tokens=max_prompt_tokens,
                    batch_size=batch_size,
                    seed=seed,
                    max_samples=max_samples,
                    thinking=thinking,
                    progress=progress,
                )
            else:
                store = answer_remotely(
                    Server(server, model, os.environ.get("OPENAI_API_KEY", "none"), concurrency),
                    ChatTemplate.load(target, thinking),
                    asked,
                    out,
                    greedy_share=greedy_share,
                    temperature=temperature,
                    top_p=top_p,
                    max_new_tokens=max_new_tokens,
                    max_prompt_tokens=max_prompt_tokens,
                    seed=seed,
                    max_samples=max_samples,
                    progress=progress,
                )
        _report(f"{len(store.prompt_keys())} answered prompts in {out}", skipped.summary())
        for leftover in sorted({out.with_suffix(f".{kind}.jsonl") for kind in ("skipped", "errors")}):
            if leftover.exists():
                report(f"what was left out, and why: {leftover}")


@data_app.command()
def build(
    sources: Annotated[
        list[str], typer.Argument(help="Files by `dspark data answers`; with --target, answered conversations too.")
    ],
    out: _Out,
    target: Annotated[Path | None, typer.Option(help="Checkpoint of the target, for conversations in text.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Longer samples are skipped.")] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="For the template; default: as it is.")
    ] = None,
) -> None:
    """Write samples into one tokenised store that is memory-mapped."""
    with one_line_errors():
        from dspark_training.data.chat import ChatTemplate
        from dspark_training.data.skipped import Skipped
        from dspark_training.data.tokens import build as build_store

        skipped = Skipped(out.with_name(f"{out.name}.skipped.jsonl"))
        template = None if target is None else ChatTemplate.load(target, thinking)
        made = build_store(sources, out, skipped, template=template, max_tokens=max_tokens)
        _report(
            f"{made.samples} samples, {made.tokens:,} tokens, {made.supervised:,} of them the assistant's, in {out} "
            f"(content {made.content_hash[:16]})",
            skipped.summary(),
        )


@data_app.command()
def stats(
    path: Annotated[str, typer.Argument(help="Prompts, samples or a tokenised store.")],
    against: Annotated[list[Path] | None, typer.Option(help="Evaluation prompts in JSONL; repeat it.")] = None,
    target: Annotated[Path | None, typer.Option(help="Checkpoint of the target; for samples with --against.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Show lengths, domains, duplicates, and overlap with evaluation prompts."""
    with one_line_errors():
        from dspark_training.data.chat import ChatTemplate
        from dspark_training.data.skipped import Skipped
        from dspark_training.data.stats import stats as look

        skipped = Skipped(None)
        decode = None if target is None else ChatTemplate.load(target).tokenizer.decode
        found = look(path, skipped, against or [], decode)
        if as_json:
            console.print_json(json.dumps(found.as_json()))
            return
        console.print(_table(found))
        _report("", skipped.summary())


def _table(found: Stats) -> Table:
    table = Table(title=f"{found.rows} {found.kind}", show_header=False)
    for name, lengths in (("length", found.lengths), ("by the assistant", found.supervised)):
        if lengths is not None:
            table.add_row(
                f"{name} ({found.unit})",
                f"{lengths.total:,} in all; mean {lengths.mean:.0f}, median {lengths.median:.0f}, "
                f"95 % {lengths.p95:.0f}, longest {lengths.longest}",
            )
    for name, counts in (("domains", found.domains), ("temperature", found.temperatures), ("thinking", found.thinking)):
        if counts:
            table.add_row(name, ", ".join(f"{count} {value}" for value, count in counts.items()))
    near = "" if found.near_duplicates is None else f", {found.near_duplicates} nearly"
    table.add_row("duplicates", f"{found.duplicates}{near}")
    for one in found.overlaps:
        table.add_row(f"overlap with {one.dataset}", f"{one.found} of {one.judged} prompts ({one.prompts} in all)")
    if found.content_hash:
        table.add_row("content", found.content_hash)
    return table


def _counts(count: list[str]) -> dict[str, int]:
    wanted = {}
    for entry in count:
        domain, _, number = entry.partition("=")
        if not number.isdigit() or not int(number):
            raise OptionError(f"--count {entry}", expected="DOMAIN=NUMBER, such as chat=1000", fix="Correct it.")
        wanted[domain] = int(number)
    return wanted


def _report(*lines: str) -> None:
    for line in filter(None, lines):
        report(line)


@contextmanager
def _progress(stage: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(stage, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
