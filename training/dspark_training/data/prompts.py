"""Conversations from JSONL files and Hugging Face datasets."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dspark_serving.errors import DataError
from dspark_training.data.conversation import Conversation, Prompt, RowError, parse_row
from dspark_training.data.jsonl import append_rows, json_lines
from dspark_training.data.skipped import Skipped


def read_prompts(source: str | Path, skipped: Skipped | None = None, limit: int | None = None) -> list[Prompt]:
    """Prompts of a JSONL file or a dataset (see read_conversations); equal ones once."""
    found: dict[str, Prompt] = {}
    for where, conversation in read_conversations(source, skipped, limit):
        try:
            prompt = Prompt.of(conversation)
        except RowError as error:
            _leave_out(skipped, error, where, conversation)
            continue
        found.setdefault(prompt.key, prompt)
    return list(found.values())


def read_conversations(
    source: str | Path, skipped: Skipped | None = None, limit: int | None = None
) -> Iterator[tuple[str, Conversation]]:
    """Conversations of a `.jsonl` file, of a dataset on disk, or of a dataset on the Hugging Face hub.

    Args:
        source: a path, or a dataset's name, with its split behind `@` if that is not `train`.
        skipped: takes rows that cannot be used; without it the first one is an error.
        limit: rows to read at most.

    Yields:
        (where it stands, conversation); see parse_row for the layouts.

    Raises:
        DataError: the source cannot be read, or (without `skipped`) a row; names its line.
    """
    for where, row in itertools.islice(raw_rows(source), limit):
        try:
            if isinstance(row, RowError):
                raise row
            yield where, parse_row(row)
        except RowError as error:
            _leave_out(skipped, error, where, row)


def raw_rows(source: str | Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, decoded row) of a `.jsonl` file or a dataset; a RowError as the row where it is no JSON."""
    return json_lines(Path(source)) if str(source).endswith(".jsonl") else _dataset_rows(str(source))


def save_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write rows that read_prompts reads back; the file is complete or as it was before."""
    partial = path.with_name(f".partial-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    append_rows(partial, map(_row_of, prompts))
    os.replace(partial, path)


def _row_of(prompt: Prompt) -> dict[str, Any]:
    if prompt == Prompt.ask(prompt.domain, prompt.text):
        return {"domain": prompt.domain, "prompt": prompt.text}
    return {"domain": prompt.domain, "messages": prompt.messages} | ({"tools": prompt.tools} if prompt.tools else {})


def with_suffix(prompts: Sequence[Prompt], domain: str, suffix: str, share: float, *, seed: int) -> list[Prompt]:
    """Append `suffix` to a random `share` of one domain's prompts (how a benchmark asks its questions)."""
    rng = random.Random(seed)
    return [p.with_suffix(suffix) if p.domain == domain and rng.random() < share else p for p in prompts]


def _dataset_rows(source: str) -> Iterator[tuple[str, Any]]:
    import datasets  # a second of imports that JSONL files do not need

    name, _, split = source.partition("@")
    split = split or "train"
    try:
        if (Path(name) / "state.json").exists():
            rows: Iterable[Any] = datasets.load_from_disk(name)
        elif Path(name).is_file():
            rows = datasets.load_dataset(
                Path(name).suffix.removeprefix("."), data_files={split: name}, split=split, streaming=True
            )
        else:
            # Streamed: a few thousand rows of a large dataset should not cost its whole download.
            rows = datasets.load_dataset(name, split=split, streaming=True)
        for i, row in enumerate(rows):
            yield f"{name}@{split}[{i}]", row
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"dataset {name!r}, split {split!r}, cannot be read ({error})",
            expected="a .jsonl file, a dataset directory, or a dataset's name on the Hugging Face hub",
            fix="Check name, split (NAME@SPLIT) and network; without network, pass a local copy.",
        ) from error


def _leave_out(skipped: Skipped | None, error: RowError, where: str, row: Any) -> None:
    if skipped is None:
        raise error.at(where) from None
    skipped.add(error.problem, where, None if isinstance(row, RowError) else row)
