"""An evaluation: every subject answers every dataset at every temperature; what is done is kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from dspark_serving.bench.results import Row
from dspark_training.data.conversation import Message, Prompt
from dspark_training.evaluation.figures import (
    difference_row,
    equal_texts,
    labels_of,
    position_rows,
    result_row,
)
from dspark_training.evaluation.records import Record, RecordFile
from dspark_training.evaluation.subjects import PLAIN, Ask, Subject, sample_of, walked
from dspark_training.evaluation.walk import walk_prompt_lookup

PROMPT_LOOKUP = "prompt_lookup"
Progress = Callable[[str, int, int], None]  # (what, turns done, turns in all)


class Point(NamedTuple):
    """One dataset at one temperature."""

    dataset: str
    temperature: float


Answers = Mapping[Point, Mapping[str, list[Record]]]
"""Records by subject."""


class Evaluation:
    """What is asked, and where the answers are kept.

    Args:
        target: how results call it.
        datasets: name -> questions.
        work: directory of the answers; a second run with the same settings goes on there.
    """

    def __init__(
        self,
        target: str,
        datasets: Mapping[str, Sequence[Prompt]],
        temperatures: Sequence[float],
        max_tokens: int,
        work: Path,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        self._target, self._datasets, self._max_tokens, self._work = target, datasets, max_tokens, work
        self._progress = progress
        self.points = [Point(name, t) for name in datasets for t in temperatures]

    def answers(self, subject: Subject, point: Point) -> list[Record]:
        """The subject's records of a point; those that are kept are not made again."""
        questions = self._datasets[point.dataset]
        folder = self._work / re.sub(r"[^\w.-]", "_", subject.name)
        settings = {"target": self._target, "max_tokens": self._max_tokens, **point._asdict(), **subject.settings}
        file = RecordFile(folder / f"{point.dataset}-t{point.temperature:g}.jsonl", settings)
        what = f"{subject.name} · {point.dataset} · temperature {point.temperature:g}"
        total = sum(len(list(question.openings())) for question in questions)
        while asks := _open_turns(questions, file.records):
            self._progress(what, total - _left(questions, file.records), total)
            for records in subject.answer(asks, point.temperature, self._max_tokens):
                file.add(records)
                self._progress(what, total - _left(questions, file.records), total)
        self._progress(what, total, total)
        return file.answers_to(question.key for question in questions)

    def rows(self, subjects: Sequence[Subject], answers: Answers) -> list[Row]:
        """All figures: by dataset, by domain where it has several datasets, of prompt lookup, by position, compared."""
        results, positions, compared = [], [], []
        for point, named in {**answers, **_by_domain(answers)}.items():
            for subject in (s for s in subjects if s.name in named):
                records, who = named[subject.name], self._identity(subject.name, subject.family, point)
                row = result_row(records, subject.gamma, who)
                if point.temperature == 0 and subject.name != PLAIN:
                    row["equal_to_off"] = equal_texts(records, named.get(PLAIN, []))
                results.append(row)
                labels = labels_of(records)
                if labels is not None:
                    positions += position_rows(labels, subject.calibration, who)
            results += self._lookup_rows(subjects, point, named)
            for ours, theirs in combinations([s for s in subjects if s.name in named and s.name != PLAIN], 2):
                who = self._identity(ours.name, ours.family, point)
                compared.append(difference_row(named[ours.name], named[theirs.name], who, theirs.name))
        return results + compared + positions

    def _lookup_rows(self, subjects: Sequence[Subject], point: Point, named: Mapping[str, list[Record]]) -> list[Row]:
        """Prompt lookup with the first drafter's block size, on the answers of the first subject that has their ids."""
        gamma = next((s.gamma for s in subjects if s.gamma), None)
        answered = next((r for r in named.values() if all(x.answer_ids for x in r)), None)
        if gamma is None or answered is None:
            return []
        # A draft without randomness is kept exactly when it is the token that was drawn: that holds at any temperature.
        looked_up = [walked(r, walk_prompt_lookup(sample_of(r), gamma), gamma) for r in answered]
        return [result_row(looked_up, gamma, self._identity(PROMPT_LOOKUP, None, point))]

    def _identity(self, name: str, family: str | None, point: Point) -> Row:
        drafts = name not in (PLAIN, PROMPT_LOOKUP)
        return {
            "arm": name,
            "target": self._target,
            "drafter": name if drafts else None,
            "family": family,
            **point._asdict(),
        }


def _open_turns(questions: Sequence[Prompt], records: Sequence[Record]) -> list[Ask]:
    """The next turn of every question that is not answered to its end."""
    texts = {(record.question, record.turn): record.text for record in records}
    asks = []
    for question in questions:
        messages: list[Message] = []
        turn = 0
        openings = set(question.openings())
        for count, message in enumerate(question.messages, start=1):
            messages.append(message)
            if count not in openings:
                continue
            if (question.key, turn) not in texts:
                asks.append(Ask(question, turn, messages))
                break
            messages.append({"role": "assistant", "content": texts[question.key, turn]})
            turn += 1
    return asks


def _left(questions: Sequence[Prompt], records: Sequence[Record]) -> int:
    answered = {(record.question, record.turn) for record in records}
    wanted = ((q.key, turn) for q in questions for turn in range(len(list(q.openings()))))
    return sum(key not in answered for key in wanted)


def _by_domain(answers: Answers) -> dict[Point, dict[str, list[Record]]]:
    """The same records by domain, for domains that several datasets have."""
    found: dict[Point, dict[str, list[Record]]] = {}
    sources: dict[str, set[str]] = {}
    for point, named in answers.items():
        for name, records in named.items():
            for record in records:
                sources.setdefault(record.domain, set()).add(point.dataset)
                key = Point(f"all {record.domain}", point.temperature)
                found.setdefault(key, {}).setdefault(name, []).append(record)
    several = {f"all {domain}" for domain, datasets in sources.items() if len(datasets) > 1}
    return {point: named for point, named in found.items() if point.dataset in several}
