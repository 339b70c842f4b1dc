"""Text as words: what is a duplicate, what overlaps, what is degenerate."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

_WORD = re.compile(r"\w+")
_RUN = re.compile(r"(.)\1{19,}", re.DOTALL)  # twenty times the same character
_SHINGLE = 3
_LEAST_WORDS = 3
_LOOP_WORDS = 12  # shorter texts repeat themselves by chance


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return _WORD.findall(text.casefold())


def ngrams(items: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every run of n items; none if there are fewer."""
    return (tuple(items[i : i + n]) for i in range(len(items) - n + 1))


class Duplicates:
    """Recognises texts that were seen before, word for word or nearly so.

    Args:
        similarity: share of common word trigrams (Jaccard) from which two texts are nearly the same.
    """

    def __init__(self, similarity: float = 0.7) -> None:
        self.similarity = similarity
        self._exact: set[tuple[str, ...]] = set()
        self._sizes: list[int] = []  # of each text's trigrams
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)  # trigram -> texts

    def add(self, text: str) -> str | None:
        """Remember a text; `duplicate` or `near duplicate` if it, or one like it, was added before, else None."""
        said = tuple(words(text))
        if said in self._exact:
            return "duplicate"
        self._exact.add(said)
        shingles = set(ngrams(said, _SHINGLE))
        common = Counter(holder for shingle in shingles for holder in self._holders.get(shingle, ()))
        for holder, shared in common.items():
            if shared >= self.similarity * (self._sizes[holder] + len(shingles) - shared):
                return "near duplicate"
        for shingle in shingles:
            self._holders[shingle].append(len(self._sizes))
        self._sizes.append(len(shingles))
        return None


def degenerate(text: str) -> str | None:
    """Why a text that a model wrote is no usable user message, or None."""
    said = words(text)
    if len(said) < _LEAST_WORDS:
        return "too short"
    if "\ufffd" in text or any(ord(c) < 32 and c not in "\n\t" for c in text):
        return "broken characters"
    if _RUN.search(text):
        return "a run of one character"
    if len(said) >= _LOOP_WORDS:
        grams = list(ngrams(said, _SHINGLE))
        if len(set(grams)) < 0.6 * len(grams):
            return "repeats itself"
    lines = [line.strip() for line in text.splitlines() if len(line.split()) > 2]
    if len(lines) > 2 and Counter(lines).most_common(1)[0][1] > len(lines) / 2:
        return "repeats itself"
    return None
