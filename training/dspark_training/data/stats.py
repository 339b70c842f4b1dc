"""What is in a data set: lengths, domains, duplicates, and overlap with evaluation prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dspark_serving.errors import DataError
from dspark_training.data.conversation import Conversation
from dspark_training.data.jsonl import json_lines
from dspark_training.data.prompts import read_conversations, read_prompts
from dspark_training.data.skipped import Skipped
from dspark_training.data.store import content_hash
from dspark_training.data.text import Duplicates, ngrams, words
from dspark_training.data.tokens import TokenStore, load_samples

GRAM = 13  # words that two texts must share in a row to overlap (GPT-3, https://arxiv.org/abs/2005.14165, appendix C)
_LEAST_GRAM = 8  # a shorter evaluation prompt cannot be judged

Decode = Callable[[Sequence[int]], str]


class Lengths(NamedTuple):
    """A distribution of lengths."""

    total: int
    mean: float
    median: float
    p95: float
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        values = np.asarray(lengths)
        return cls(
            int(values.sum()),
            float(values.mean()),
            float(np.median(values)),
            float(np.percentile(values, 95)),
            int(values.max()),
        )


class Overlap(NamedTuple):
    """How much of an evaluation set stands in the data."""

    dataset: str
    prompts: int
    judged: int  # prompts of at least eight words
    found: int  # of these, prompts with a run of 13 words (or all their words, if fewer) in the data


class Stats(NamedTuple):
    """Everything `dspark data stats` shows; lengths are in `unit`."""

    kind: str  # prompts or samples
    unit: str  # words or tokens
    rows: int
    skipped: dict[str, int]  # reason -> rows
    domains: dict[str, int]
    temperatures: dict[str, int]
    thinking: dict[str, int]
    lengths: Lengths
    supervised: Lengths | None  # of samples
    duplicates: int  # rows that say the same as an earlier one
    near_duplicates: int | None  # None: not looked for among token ids
    content_hash: str | None
    overlaps: list[Overlap]

    def as_json(self) -> dict[str, Any]:
        nested = {"lengths": self.lengths, "supervised": self.supervised}
        return (
            self._asdict()
            | {name: value and value._asdict() for name, value in nested.items()}
            | {"overlaps": [overlap._asdict() for overlap in self.overlaps]}
        )


def stats(path: str | Path, skipped: Skipped, against: Sequence[Path] = (), decode: Decode | None = None) -> Stats:
    """Look through prompts or samples.

    Args:
        path: prompts (as read_conversations takes them), samples in JSONL, or a tokenised store, which is checked
            against its hash.
        against: evaluation prompts in JSONL.
        decode: the target's tokenizer, needed to compare the words of samples with `against`.

    Raises:
        DataError: nothing to look at, a damaged store, or `against` without `decode` for samples.
    """
    if _holds_samples(Path(path)):
        return _of_samples(path, against, decode)
    return _of_prompts(path, skipped, against)


def overlap(texts: Iterable[str], against: Sequence[Path]) -> list[Overlap]:
    """Which evaluation prompts share a run of 13 words (or all their words, from eight on) with the texts."""
    wanted: dict[int, dict[tuple[str, ...], set[tuple[int, int]]]] = {}  # length -> gram -> (dataset, prompt)
    sizes = []
    for d, path in enumerate(against):
        prompts = [words(prompt.text) for prompt in read_prompts(path)]
        judged = [(p, said) for p, said in enumerate(prompts) if len(said) >= _LEAST_GRAM]
        sizes.append((len(prompts), len(judged)))
        for p, said in judged:
            n = min(GRAM, len(said))
            for gram in ngrams(said, n):
                wanted.setdefault(n, {}).setdefault(gram, set()).add((d, p))
    found: set[tuple[int, int]] = set()
    for text in texts if wanted else ():
        said = words(text)
        for n, grams in wanted.items():
            found.update(*(grams[gram] for gram in ngrams(said, n) if gram in grams))
    counts = Counter(d for d, _ in found)
    return [Overlap(path.stem, *sizes[d], counts[d]) for d, path in enumerate(against)]


def _holds_samples(path: Path) -> bool:
    if path.is_dir():
        return (path / "dspark.json").exists()
    if path.suffix != ".jsonl":
        return False
    first = next(json_lines(path), None)
    return first is not None and isinstance(first[1], dict) and "ids" in first[1]


def _of_samples(path: str | Path, against: Sequence[Path], decode: Decode | None) -> Stats:
    if against and decode is None:
        raise DataError(
            "samples are token ids, evaluation prompts are text", expected="a tokenizer", fix="Pass --target."
        )
    samples = load_samples(path)
    if isinstance(samples, TokenStore):
        samples.verify()
    return Stats(
        kind="samples",
        unit="tokens",
        rows=len(samples),
        skipped={},
        domains=dict(Counter(s.domain for s in samples).most_common()),
        temperatures=dict(Counter("unknown" if s.temperature is None else f"{s.temperature:g}" for s in samples)),
        thinking=dict(Counter({None: "as the template", True: "on", False: "off"}[s.thinking] for s in samples)),
        lengths=Lengths.of([len(s.ids) for s in samples]),
        supervised=Lengths.of([s.supervised for s in samples]),
        duplicates=len(samples) - len({tuple(s.ids) for s in samples}),
        near_duplicates=None,
        content_hash=content_hash(samples),
        overlaps=overlap((decode(s.ids) for s in samples) if decode else (), against),
    )


def _of_prompts(path: str | Path, skipped: Skipped, against: Sequence[Path]) -> Stats:
    rows = [conversation for _, conversation in read_conversations(path, skipped)]
    if not rows:
        raise DataError(f"{path} holds no conversation", expected="prompts or samples", fix="Check the path.")
    seen = Duplicates()
    verdicts = Counter(seen.add(_text_of(row)) for row in rows)
    return Stats(
        kind="prompts",
        unit="words",
        rows=len(rows),
        skipped=dict(skipped.counts),
        domains=dict(Counter(row.domain for row in rows).most_common()),
        temperatures={},
        thinking={},
        lengths=Lengths.of([len(words(_text_of(row))) for row in rows]),
        supervised=None,
        duplicates=verdicts["duplicate"],
        near_duplicates=verdicts["near duplicate"],
        content_hash=None,
        overlaps=overlap(map(_text_of, rows), against),
    )


def _text_of(conversation: Conversation) -> str:
    return "\n".join(message["content"] for message in conversation.messages)
