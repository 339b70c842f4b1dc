"""The tokenised store: samples as an Arrow dataset that is memory-mapped, with a hash of its content."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import datasets

from dspark_serving.errors import DataError
from dspark_training.data.chat import ChatTemplate, TemplateMismatchError
from dspark_training.data.conversation import RowError, parse_row
from dspark_training.data.prompts import raw_rows
from dspark_training.data.skipped import Skipped
from dspark_training.data.store import LEAST_SUPERVISED, Sample, content_hash, read_samples, sample_of
from dspark_training.data.tokenizer import fingerprint, noted, require_same

_SUMMARY = "dspark.json"


class Summary(NamedTuple):
    """What a tokenised store holds."""

    samples: int
    tokens: int
    supervised: int
    content_hash: str  # see store.content_hash
    tokenizer: str | None = None  # see tokenizer.fingerprint; None: not known


class TokenStore(Sequence[Sample]):
    """Samples of a directory made by `build`, read from the disk when they are asked for.

    Raises:
        DataError: the directory is no such store, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.summary = Summary(**json.loads((path / _SUMMARY).read_text()))
            self._rows = datasets.load_from_disk(str(path))
        except (OSError, ValueError, TypeError) as error:
            raise _damaged(path, str(error)) from error
        if len(self._rows) != self.summary.samples:
            raise _damaged(path, f"{len(self._rows)} rows of {self.summary.samples}")
        self.path = path

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._rows[index]
        return Sample(**row | {"spans": [(start, end) for start, end in row["spans"]]})

    def verify(self) -> None:
        """Read everything and compare it with the hash.

        Raises:
            DataError: the content has changed since it was built.
        """
        if content_hash(self) != self.summary.content_hash:
            raise _damaged(self.path, "its content does not have the hash that was noted")


def load_samples(path: str | Path, tokenizer: str | None = None) -> Sequence[Sample]:
    """Samples of a tokenised store (memory-mapped) or of a JSONL file by `dspark data answers`.

    Args:
        tokenizer: fingerprint of the one that the ids shall come from; None takes any.

    Raises:
        DataError: there is nothing, what is there is damaged, or it names another tokenizer.
    """
    path = Path(path)
    if tokenizer is not None:
        require_same(path, _tokenizer_of(path), tokenizer)
    samples: Sequence[Sample] = TokenStore(path) if path.is_dir() else list(read_samples(path))
    if not samples:
        raise DataError(f"{path} holds no sample", expected="answered prompts", fix="Run `dspark data answers` first.")
    return samples


def build(
    sources: Sequence[str | Path],
    output: Path,
    skipped: Skipped,
    *,
    template: ChatTemplate | None = None,
    max_tokens: int | None = None,
) -> Summary:
    """Write samples and answered conversations into one tokenised store; the directory is complete or absent.

    Args:
        sources: files by `dspark data answers`, and with `template` answered conversations (see read_conversations).
        skipped: takes malformed rows, over-long samples and those with nothing to train on.
        max_tokens: longer samples are left out.

    Raises:
        DataError: nothing is left, a text needs `template`, tokenizers differ, or the disk is full.
    """
    tokenizer = None if template is None else fingerprint(template.tokenizer)
    for path in map(Path, sources):
        found = _tokenizer_of(path)
        tokenizer = tokenizer or found
        if tokenizer is not None:
            require_same(path, found, tokenizer)
    kept: dict[str, Sample] = {}
    for source in sources:
        for where, sample in _samples_of(source, template, skipped):
            reason = _unusable(sample, max_tokens, kept)
            if reason:
                skipped.add(reason, where, {"key": sample.key})
            else:
                kept[sample.key] = sample
    samples = [kept[key] for key in sorted(kept)]
    if not samples:
        raise DataError(
            f"no sample is left. {skipped.summary()}", expected="at least one", fix="Look into the skipped rows."
        )
    tokens = sum(len(s.ids) for s in samples)
    summary = Summary(len(samples), tokens, sum(s.supervised for s in samples), content_hash(samples), tokenizer)
    # Two bytes an id where the vocabulary allows it.
    _save(samples, summary, output, "uint16" if max(max(s.ids) for s in samples) < 2**16 else "uint32")
    return summary


def _tokenizer_of(path: Path) -> str | None:
    return TokenStore(path).summary.tokenizer if (path / _SUMMARY).is_file() else noted(path)


def _samples_of(source: str | Path, template: ChatTemplate | None, skipped: Skipped) -> Iterator[tuple[str, Sample]]:
    for where, row in raw_rows(source):
        try:
            if isinstance(row, dict) and "ids" in row:
                yield where, sample_of(row)
            else:
                yield from ((where, sample) for sample in _masked(row, where, template))
        except (RowError, TemplateMismatchError) as error:
            skipped.add(error.problem, where, None if isinstance(row, RowError) else row)


def _masked(row: object, where: str, template: ChatTemplate | None) -> Iterator[Sample]:
    if isinstance(row, RowError):
        raise row
    said = parse_row(row)
    if template is None:
        raise DataError(
            f"{where} is a conversation in text", expected="samples as token ids, or a target", fix="Pass --target."
        )
    for i, passage in enumerate(template.passages(said)):
        key = f"{said.key}.{i}" if i else said.key
        yield Sample(key, said.domain, None, passage.ids, passage.spans, thinking=template.thinking)


def _unusable(sample: Sample, max_tokens: int | None, kept: Mapping[str, Sample]) -> str | None:
    if max_tokens is not None and len(sample.ids) > max_tokens:
        return f"more than {max_tokens} tokens"
    if sample.supervised < LEAST_SUPERVISED:
        return "empty answer"
    return "the same prompt again" if sample.key in kept else None


def _save(samples: Sequence[Sample], summary: Summary, output: Path, id_type: str) -> None:
    if output.exists() and not (output / _SUMMARY).exists():
        raise DataError(
            f"{output} exists", expected="a new directory, or one by `dspark data build`", fix="Choose another."
        )
    features = datasets.Features(
        key=datasets.Value("string"),
        domain=datasets.Value("string"),
        temperature=datasets.Value("float64"),
        ids=datasets.List(datasets.Value(id_type)),
        spans=datasets.List(datasets.List(datasets.Value("uint32"))),
        top_p=datasets.Value("float64"),
        thinking=datasets.Value("bool"),
    )
    partial = output.with_name(f".partial-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        columns = {name: [getattr(s, name) for s in samples] for name in Sample._fields}
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(partial))
        (partial / _SUMMARY).write_text(json.dumps(summary._asdict(), indent=1))
        shutil.rmtree(output, ignore_errors=True)
        os.replace(partial, output)
    except OSError as error:
        raise DataError(
            f"{output} cannot be written ({error})", expected="space on the disk", fix="Free some and run it again."
        ) from error


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path} is no tokenised store or is damaged ({problem})",
        expected="a directory by `dspark data build`",
        fix="Build it again.",
    )
