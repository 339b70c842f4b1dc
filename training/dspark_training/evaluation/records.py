"""What was measured of every answer, and the file that keeps it while an evaluation is under way."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dspark_serving.errors import DataError
from dspark_training.data.jsonl import append_rows, drop_torn_line

_DIGITS = 5  # of a confidence


class Record(BaseModel):
    """One answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str  # its key
    turn: int
    domain: str
    text: str
    output_tokens: int
    seconds: float  # its share of the time in which it was made
    rounds: int  # of this request; the first token is the prefill's and belongs to none
    round_tokens: int  # made by the rounds, bonus tokens included
    prompt_ids: list[int] = []  # where the answer was made in this process
    answer_ids: list[int] = []
    accepted: list[int] = []  # drafts kept in each round; empty where only totals are known
    verified: list[int] = []  # drafts of each round in front of the answer's end
    confidence: list[list[float]] = []  # [round][position]; empty without drafts


class RecordFile:
    """Records of one subject, dataset and temperature; what a killed run had written stays.

    Raises:
        DataError: the file was made with other settings, or is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.records: list[Record] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_torn_line(path)
        if path.exists() and path.stat().st_size:
            self.records = self._read(dict(settings))
        else:
            append_rows(path, [settings])

    def answers_to(self, questions: Iterable[str]) -> list[Record]:
        """The records of these questions, ordered by question and turn."""
        order = {key: place for place, key in enumerate(questions)}
        kept = [record for record in self.records if record.question in order]
        return sorted(kept, key=lambda record: (order[record.question], record.turn))

    def add(self, records: Sequence[Record]) -> None:
        """Keep some more."""
        self.records += records
        append_rows(self.path, (record.model_dump(exclude_defaults=True) for record in records))

    def _read(self, settings: dict[str, Any]) -> list[Record]:
        fix = f"Use another --work, or delete {self.path} to begin anew."
        header, *lines = self.path.read_text().splitlines()
        try:
            found = json.loads(header)
            records = [Record.model_validate_json(line) for line in lines]
        except (ValueError, ValidationError) as error:
            raise DataError(f"{self.path} is damaged ({error})", expected="answers by this command", fix=fix) from error
        differing = sorted(key for key in {*settings, *found} if found.get(key) != settings.get(key))
        if differing:
            raise DataError(
                f"{self.path} holds answers with other settings ({', '.join(differing)})",
                expected="those of this evaluation, to go on from",
                fix=fix,
            )
        return records


def rounded(confidence: Sequence[Sequence[float]]) -> list[list[float]]:
    """Confidences as they are kept."""
    return [[round(value, _DIGITS) for value in row] for row in confidence]
