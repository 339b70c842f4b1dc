"""Evaluation datasets: what each published one is called and how its rows become questions.

The prompts are those of DeepSpec's and DFlash's evaluations where these are public (z-lab/dflash, dflash/benchmark.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dspark_serving.errors import DataError
from dspark_training.data.conversation import Prompt, RowError, parse_row
from dspark_training.data.jsonl import json_lines

Row = Mapping[str, Any]
_REASON = "\nPlease reason step by step, and put your final answer within \\boxed{{}}."


class Source(NamedTuple):
    """A published dataset."""

    path: str  # on the Hugging Face hub
    config: str | None
    split: str
    domain: str
    turns: Callable[[Row], list[str]]
    files: str | None = None  # in its repository, where it has no loadable configuration


def _one(template: str) -> Callable[[Row], list[str]]:
    return lambda row: [template.format(**row)]


def _code_problem(row: Row) -> list[str]:
    """A LiveCodeBench problem, with its starter code where it has some."""
    starter = f"\nStart from this code:\n```python\n{row['starter_code']}\n```" if row["starter_code"] else ""
    return [f"Write a Python program that solves the following problem.\n\n{row['question_content']}{starter}"]


def _alpaca(row: Row) -> list[str]:
    return [f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]]


SOURCES: dict[str, Source] = {
    "gsm8k": Source("openai/gsm8k", "main", "test", "math", _one("{question}" + _REASON)),
    "math500": Source("HuggingFaceH4/MATH-500", None, "test", "math", _one("{problem}" + _REASON)),
    "aime25": Source("MathArena/aime_2025", None, "train", "math", _one("{problem}" + _REASON)),
    "humaneval": Source(
        "openai/openai_humaneval",
        None,
        "test",
        "code",
        _one(
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            "```python\n{prompt}\n```"
        ),
    ),
    "mbpp": Source("google-research-datasets/mbpp", "sanitized", "test", "code", _one("{prompt}")),
    "livecodebench": Source(
        "livecodebench/code_generation_lite", None, "train", "code", _code_problem, files="test*.jsonl"
    ),
    "mt-bench": Source("HuggingFaceH4/mt_bench_prompts", None, "train", "chat", lambda row: list(row["prompt"])),
    "alpaca": Source("tatsu-lab/alpaca", None, "train", "chat", _alpaca),
    "arena-hard-v2": Source(
        "lmarena-ai/arena-hard-auto",
        None,
        "train",
        "chat",
        _one("{prompt}"),
        files="data/arena-hard-v2.0/question.jsonl",
    ),
}
"""The nine benchmarks of the DSpark paper (arXiv 2607.05147), by the names used here."""


def read_questions(text: str, limit: int, turns: int = 1) -> tuple[str, list[Prompt]]:
    """A dataset as the command line names it, and at most `limit` of its questions, spread evenly over it.

    Args:
        text: NAME of SOURCES, fetched by `datasets`; or NAME=PATH: a JSONL file (rows as `parse_row` reads them),
            or a directory that `datasets` loads and whose rows are those of the published dataset NAME.
        limit: questions; 0 for all.
        turns: first turns of each conversation that are asked.

    Raises:
        DataError: an unknown name, a path that cannot be read, or a malformed row; names the row.
    """
    name, _, path = text.partition("=")
    source = SOURCES.get(name)
    if path and Path(path).is_file():
        domain = source.domain if source else "chat"
        questions = [_question(row, domain, where) for where, row in json_lines(Path(path))]
    elif source is None:
        raise DataError(
            f"there is no dataset {name!r}" + (f" and no file {path}" if path else ""),
            expected=f"one of {', '.join(SOURCES)}, or NAME=FILE.jsonl",
            fix="Correct --dataset.",
        )
    else:
        questions = questions_of(name, _rows(source, path or None))
    if not questions:
        raise DataError(f"the dataset {text} is empty", expected="questions", fix="Choose another one.")
    step = max(1.0, len(questions) / limit) if limit else 1.0
    chosen = [questions[int(i * step)] for i in range(min(limit or len(questions), len(questions)))]
    unique = {q.key: q for q in (_first_turns(question, turns) for question in chosen)}
    return name, list(unique.values())


def questions_of(name: str, rows: Iterable[Row]) -> list[Prompt]:
    """Questions of rows as the published dataset `name` has them.

    Raises:
        DataError: a row lacks a column or holds no text; names the row.
    """
    source = SOURCES[name]
    questions = []
    for number, row in enumerate(rows):
        where = f"row {number} of {name}"
        try:
            turns = source.turns(row)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{where} cannot be read ({type(error).__name__}: {error})",
                expected=f"the columns of {source.path}",
                fix="Give that dataset, or a JSONL file with `prompt` or `turns` as NAME=FILE.",
            ) from error
        questions.append(_question({"turns": turns}, source.domain, where))
    return questions


def _question(row: object, domain: str, where: str) -> Prompt:
    try:
        if isinstance(row, RowError):
            raise row
        conversation = parse_row(row)
        named = isinstance(row, Mapping) and row.get("domain")
        return Prompt.of(conversation if named else conversation._replace(domain=domain))
    except RowError as error:
        raise error.at(where) from None


def _first_turns(question: Prompt, turns: int) -> Prompt:
    return question._replace(messages=question.messages[: list(question.openings())[:turns][-1]])


def _rows(source: Source, directory: str | None) -> Iterable[Row]:
    import datasets  # takes seconds, and JSONL needs it not

    path = directory or source.path
    try:
        if directory is None and source.files is not None:
            return datasets.load_dataset(path, data_files=source.files, split=source.split)
        return datasets.load_dataset(path, None if directory else source.config, split=source.split)
    # Whatever the hub, its files or their builder raise: the library has no common base of them.
    except Exception as error:
        raise DataError(
            f"the dataset {path} cannot be loaded ({type(error).__name__}: {error})",
            expected=f"its split {source.split}",
            fix="Without network give a local copy: NAME=FILE.jsonl or NAME=DIRECTORY.",
        ) from error
