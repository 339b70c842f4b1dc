"""Samples: conversations as token ids with what the assistant wrote, and the JSONL store that grows with them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from dspark_serving.errors import DataError
from dspark_training.data.conversation import RowError
from dspark_training.data.jsonl import append_rows, drop_torn_line, json_lines
from dspark_training.data.tokenizer import note, noted, require_same

LEAST_SUPERVISED = 2  # a block needs an anchor and a token behind it
_EXPECTED = "a row by `dspark data answers`"


class Sample(NamedTuple):
    """One conversation, ready to train on; only what the assistant wrote is supervised."""

    key: str  # of the prompt; ".1", ".2" ... behind it for further parts of the same conversation
    domain: str
    temperature: float | None  # at which the answers were drawn; 0: greedy, None: not known
    ids: list[int]
    spans: list[tuple[int, int]]  # half-open ranges of `ids` that the assistant wrote, ascending
    top_p: float = 1.0
    thinking: bool | None = None  # what the chat template was told; None: nothing

    @property
    def supervised(self) -> int:
        """Tokens that the assistant wrote."""
        return sum(end - start for start, end in self.spans)

    @property
    def has_anchor(self) -> bool:
        """Whether the assistant wrote two tokens in a row somewhere: one to draft behind, one to judge the draft by."""
        return any(end - start > 1 for start, end in self.spans)

    def supervised_ids(self) -> list[int]:
        """The assistant's tokens, one span after the other."""
        return [token for start, end in self.spans for token in self.ids[start:end]]


class Picked(Sequence[Sample]):
    """Samples of a sequence by their places in it, read when they are asked for."""

    def __init__(self, samples: Sequence[Sample], places: Sequence[int]) -> None:
        self._samples, self._places = samples, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._samples[place] for place in self._places[index]]
        return self._samples[self._places[index]]


def split(samples: Sequence[Sample], share: float) -> tuple[Picked, Picked]:
    """Samples to train on, and a `share` of them (at least one) to hold out.

    By their keys, which are hashes: the same whatever the order in which they were generated.
    """
    keys = [sample.key for sample in samples]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    held_out = max(1, round(len(keys) * share))
    return Picked(samples, order[held_out:]), Picked(samples, order[:held_out])


def require_ids_below(samples: Iterable[Sample], vocab_size: int) -> None:
    """Raise DataError if a sample holds an id that no target of this vocabulary has; names the first one."""
    for sample in samples:
        if max(sample.ids) >= vocab_size:
            raise DataError(
                f"the sample {sample.key} holds the token id {max(sample.ids)}",
                expected=f"ids below {vocab_size}, the target's vocabulary",
                fix="Let this target answer the prompts.",
            )


def content_hash(samples: Iterable[Sample]) -> str:
    """sha256 (hex) over keys, ids and spans in the order of the keys: the same data in any file have the same hash."""
    digest = hashlib.sha256()
    for part in sorted(hashlib.sha256(_bytes_of(sample)).digest() for sample in samples):
        digest.update(part)
    return digest.hexdigest()


def _bytes_of(sample: Sample) -> bytes:
    head = f"{sample.key}\0{sample.domain}\0{sample.temperature}\0{sample.top_p}\0{sample.thinking}\0".encode()
    ids, spans = np.asarray(sample.ids, dtype="<u4"), np.asarray(sample.spans, dtype="<u4")
    return head + len(ids).to_bytes(8, "little") + ids.tobytes() + spans.tobytes()


class SampleStore:
    """An append-only JSONL file of samples; what a killed run had written stays."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        drop_torn_line(self.path)

    def __iter__(self) -> Iterator[Sample]:
        if self.path.exists():
            yield from read_samples(self.path)

    def prompt_keys(self) -> set[str]:
        """Keys of the prompts that are answered."""
        return {sample.key.partition(".")[0] for sample in self}

    def claim(self, tokenizer: str) -> None:
        """Note whose ids an empty file will hold.

        Raises:
            DataError: there are samples of another tokenizer, or the note cannot be written.
        """
        if self.path.exists() and self.path.stat().st_size:
            require_same(self.path, noted(self.path), tokenizer)
        else:
            note(self.path, tokenizer)

    def append(self, samples: Iterable[Sample]) -> None:
        """Write samples behind those that are there.

        Raises:
            DataError: the disk is full; what was there stays.
        """
        append_rows(self.path, (sample._asdict() for sample in samples))


def sample_of(row: object) -> Sample:
    """A row of a store.

    Raises:
        RowError: the row is no sample, or its spans lie outside its ids.
    """
    if isinstance(row, RowError):
        raise row
    try:
        if not isinstance(row, dict):
            raise TypeError("no JSON object")
        sample = Sample(**row | {"spans": [(int(start), int(end)) for start, end in row["spans"]]})
        if not (type(sample.key) is type(sample.domain) is str and isinstance(sample.thinking, bool | None)):
            raise TypeError("a field of another type")
        heat = None if sample.temperature is None else _number(sample.temperature)
        sample = sample._replace(temperature=heat, top_p=_number(sample.top_p))
        ends = [0, *(edge for span in sample.spans for edge in span), len(sample.ids)]
    except (TypeError, KeyError, ValueError):
        raise RowError("no sample", expected=_EXPECTED) from None
    if ends != sorted(ends) or sample.supervised == 0 or not all(type(i) is int and i >= 0 for i in sample.ids):
        raise RowError("a sample whose spans or ids cannot be", expected=_EXPECTED)
    return sample


def _number(value: object) -> float:
    """Whole numbers too as floats: the same data have the same hash."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise TypeError("no number")
    return float(value)


def read_samples(path: Path) -> Iterator[Sample]:
    """Samples of a JSONL file.

    Raises:
        DataError: the file is missing, or a row is no sample; names the line.
    """
    for where, row in json_lines(path):
        try:
            yield sample_of(row)
        except RowError as error:
            raise error.at(where) from None
