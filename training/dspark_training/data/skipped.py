"""Rows that were left out: counted by reason, and written to a file with the reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dspark_training.data.jsonl import append_rows


class Skipped:
    """Takes what cannot be used; the file exists only if there was something.

    Args:
        path: JSONL of {"reason", "where", "row"}; a file of an earlier run is replaced. None: rows are only counted.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)

    def add(self, reason: str, where: str, row: Any) -> None:
        """Note one row.

        Args:
            reason: the same words for all rows with the same fault; they are counted by it.
            where: file and line, or the key of a prompt.
            row: what was left out; kept as text where JSON cannot hold it.
        """
        self.counts[reason] += 1
        if self.path is not None:
            append_rows(self.path, [{"reason": reason, "where": where, "row": row}])

    def summary(self) -> str:
        """`3 skipped (2 empty conversation, 1 no JSON), see FILE`, or the empty text."""
        if not self.counts:
            return ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        return f"{self.counts.total()} skipped ({reasons})" + (f", see {self.path}" if self.path else "")
