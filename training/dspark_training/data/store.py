"""Training data: prompts, conversations as token ids, and the JSONL store that holds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dspark_serving.errors import DataError


class Prompt(NamedTuple):
    """One user message."""

    domain: str  # math, code, chat, ...
    text: str

    @property
    def key(self) -> str:
        """Identity of the message: the same text in the same domain is the same prompt."""
        return hashlib.sha256(f"{self.domain}\0{self.text}".encode()).hexdigest()[:16]


class Sample(NamedTuple):
    """One conversation, ready to train on; only what the assistant wrote is supervised."""

    key: str
    domain: str
    temperature: float  # at which the answers were drawn; 0: greedy
    ids: list[int]
    spans: list[tuple[int, int]]  # half-open ranges of `ids` that the assistant wrote, ascending

    @property
    def supervised(self) -> int:
        """Tokens that the assistant wrote."""
        return sum(end - start for start, end in self.spans)

    def supervised_ids(self) -> list[int]:
        """The assistant's tokens, one span after the other."""
        return [token for start, end in self.spans for token in self.ids[start:end]]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read JSONL rows {"domain": ..., "prompt": ...} or {"turns": [first user message, ...]}.

    Raises:
        DataError: the file is missing, or a row has neither form; names the line.
    """
    prompts = []
    for number, row in _json_lines(Path(path)):
        text = row.get("prompt") or (row.get("turns") or [None])[0]
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{path}:{number} has no prompt",
                expected='a "prompt" string, or "turns" with a first user message',
                fix="Correct or delete that line.",
            )
        prompts.append(Prompt(str(row.get("domain", "chat")), text))
    return prompts


class SampleStore:
    """An append-only JSONL file of samples; what a killed run had written stays."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_torn_line()

    def __iter__(self) -> Iterator[Sample]:
        if self.path.exists():
            for _, row in _json_lines(self.path):
                row["spans"] = [tuple(span) for span in row["spans"]]
                yield Sample(**row)

    def keys(self) -> set[str]:
        return {sample.key for sample in self}

    def append(self, samples: Iterable[Sample]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(sample._asdict()) + "\n")

    def _drop_torn_line(self) -> None:
        """A kill in mid-write leaves half a line at the end: cut it off."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            with self.path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        file = path.open(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", expected="a JSONL file", fix="Check the path.") from None
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number} is no JSON ({error})",
                    expected="one JSON object a line",
                    fix="Correct or delete that line.",
                ) from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}:{number} is a {type(row).__name__}",
                    expected="a JSON object",
                    fix="Correct or delete that line.",
                )
            yield number, row
