"""From records to rows: accepted length with its interval, acceptance by position, confidence quality, differences.

Intervals are 95 %, bootstrapped over questions: the rounds of one answer are alike and count as one draw.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dspark_serving.bench.results import Row
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.calibration_fit import Labels, survival_quality
from dspark_training.evaluation.records import Record

_RESAMPLES = 2000


class Interval(NamedTuple):
    """A figure with the bounds of its 95 % interval; nan where there is nothing to draw from."""

    value: float
    low: float
    high: float


class Totals(NamedTuple):
    """Of each question."""

    tokens_Q: np.ndarray  # made by rounds, bonus tokens included
    rounds_Q: np.ndarray

    def ratio(self, drawn: np.ndarray | None = None) -> np.ndarray:
        """Tokens a round; of every resample [S] where `drawn` [S, Q] names its questions."""
        picked = self if drawn is None else Totals(*(column[drawn] for column in self))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(picked.tokens_Q.sum(-1) / picked.rounds_Q.sum(-1))


def totals_of(records: Iterable[Record]) -> dict[str, tuple[int, int]]:
    """Question -> (tokens made by rounds, rounds), all its turns together."""
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for record in records:
        tokens, rounds = found[record.question]
        found[record.question] = (tokens + record.round_tokens, rounds + record.rounds)
    return dict(found)


def accepted_length(records: Sequence[Record]) -> Interval:
    """Tokens a round over all rounds, bonus token included."""
    totals = _stack(totals_of(records).values())
    return interval(float(totals.ratio()), totals.ratio(draws(len(totals.tokens_Q))))


def difference(ours: Sequence[Record], theirs: Sequence[Record]) -> Interval:
    """Accepted length of one drafter minus that of another on the same questions, each resample the same for both."""
    mine, other = totals_of(ours), totals_of(theirs)
    shared = sorted(mine.keys() & other.keys())
    a, b = (_stack(found[key] for key in shared) for found in (mine, other))
    drawn = draws(len(shared))
    return interval(float(a.ratio() - b.ratio()), a.ratio(drawn) - b.ratio(drawn))


class Rounds(Protocol):
    """Rounds of one answer."""

    @property
    def accepted(self) -> Sequence[int]:
        """Accepted drafts of each, without the bonus token."""
        ...

    @property
    def verified(self) -> Sequence[int] | None:
        """How many drafts of each could be judged; None: all."""
        ...


def conditional_acceptance(answers: Iterable[Rounds], gamma: int) -> list[float | None]:
    """Share of drafts at each position that are kept among those of which all before were; None without any.

    A draft behind the end of its answer is left out. Without `verified`, every draft behind a kept one counts.
    """
    reached, kept = np.zeros(gamma), np.zeros(gamma)
    for rounds in answers:
        verified = rounds.verified or [gamma] * len(rounds.accepted)
        for accepted, seen in zip(rounds.accepted, verified, strict=True):
            reached[: min(accepted + 1, seen, gamma)] += 1
            kept[:accepted] += 1
    return [float(k / n) if n else None for k, n in zip(kept, reached, strict=True)]


def labels_of(records: Iterable[Record]) -> Labels | None:
    """Confidences and what became of their drafts, a row a round; None without confidences."""
    rows = [
        (confidence, 1 + verified, accepted)
        for record in records
        for confidence, verified, accepted in zip(record.confidence, record.verified, record.accepted, strict=False)
    ]
    if not rows:
        return None
    confidence, verify_lens, accepted = zip(*rows, strict=True)
    return Labels(np.array(confidence), np.array(verify_lens), np.array(accepted))


def speed(records: Sequence[Record]) -> float | None:
    """Tokens a second of all requests together, prefills included; None where nothing was timed."""
    seconds = sum(record.seconds for record in records)
    return sum(record.output_tokens for record in records) / seconds if seconds else None


def result_row(records: Sequence[Record], gamma: int | None, identity: Row) -> Row:
    """The figures of one subject on one dataset (or domain) at one temperature."""
    length = accepted_length(records)
    seconds = sum(record.seconds for record in records)
    row: Row = {
        **identity,
        "repetition": None,
        "requests": len(records),
        "output_tokens": sum(record.output_tokens for record in records),
        "seconds": seconds or None,
        "tokens_per_second": speed(records),
        "rounds": sum(record.rounds for record in records),
        "accepted_length": none_if_nan(length.value),
        "accepted_length_low": none_if_nan(length.low),
        "accepted_length_high": none_if_nan(length.high),
    }
    if gamma and any(record.accepted for record in records):
        row["conditional_acceptance"] = conditional_acceptance(records, gamma)
    return row


def position_rows(labels: Labels, calibration: Calibration | None, identity: Row) -> list[Row]:
    """Quality of the survival up to each position (a draft and all before it are kept), raw and calibrated."""
    states = {"raw": Calibration.identity(labels.gamma)} | ({} if calibration is None else {"calibrated": calibration})
    return [
        {
            **identity,
            "position": position,
            "confidence": state,
            "labels": scores.labels,
            "ece": none_if_nan(scores.ece),
            "brier": none_if_nan(scores.brier),
            "auroc": none_if_nan(scores.auroc),
        }
        for state, used in states.items()
        for position, scores in enumerate(survival_quality(labels, used), start=1)
    ]


def difference_row(ours: Sequence[Record], theirs: Sequence[Record], identity: Row, other: str) -> Row:
    """Two subjects on the same questions."""
    found = difference(ours, theirs)
    return {
        **identity,
        "compared_with": other,
        "difference": none_if_nan(found.value),
        "low": none_if_nan(found.low),
        "high": none_if_nan(found.high),
    }


def equal_texts(ours: Sequence[Record], plain: Sequence[Record]) -> float | None:
    """Share of texts equal to those of plain decoding; None without any to compare with."""
    texts = {(record.question, record.turn): record.text for record in plain}
    equal = [record.text == texts[key] for record in ours if (key := (record.question, record.turn)) in texts]
    return sum(equal) / len(equal) if equal else None


def none_if_nan(value: float) -> float | None:
    """JSON knows no nan."""
    return None if math.isnan(value) else value


def _stack(pairs: Iterable[tuple[int, int]]) -> Totals:
    table: Any = np.array(list(pairs), dtype=float).reshape(-1, 2)
    return Totals(table[:, 0], table[:, 1])


def draws(questions: int) -> np.ndarray:
    """Resamples of the questions with replacement, always the same, [S, Q]."""
    return np.random.default_rng(0).integers(max(1, questions), size=(_RESAMPLES, questions))


def interval(value: float, resampled_S: np.ndarray) -> Interval:
    """A figure with the bounds that its resamples give."""
    usable = resampled_S[np.isfinite(resampled_S)]
    low, high = np.quantile(usable, [0.025, 0.975]) if len(usable) else (math.nan, math.nan)
    return Interval(value, float(low), float(high))
