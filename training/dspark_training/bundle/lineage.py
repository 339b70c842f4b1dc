"""What went before a run: the runs of the drafter that its weights started from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from dspark_training.config import WarmStartConfig

log = logging.getLogger(__name__)

PROVENANCE = "training.json"


def earlier_runs(start: WarmStartConfig | None) -> list[dict[str, Any]]:
    """The runs behind the weights that a run starts from, oldest first.

    Each has its `algorithm`, `steps`, `tokens`, `hours`, `history` (as in its training.json) and the `part` of its
    weights that was taken. Empty for new weights, and for a drafter that does not say how it was made.
    """
    path = None if start is None else Path(start.path) / PROVENANCE
    if start is None or path is None or not path.is_file():
        return []
    try:
        made = json.loads(path.read_text())
        spent = {name: made["facts"][name] for name in ("steps", "tokens", "hours")}
        run = {"algorithm": made["recipe"]["algorithm"], "part": start.part, **spent, "history": made["history"]}
        return [*made.get("earlier", []), run]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is not of this project's form (%r): the card will not tell of earlier runs", path, error)
        return []


def told(runs: list[dict[str, Any]]) -> str:
    """A line of the card on earlier runs; empty without any."""
    if not runs:
        return ""
    steps, tokens, hours = (sum(run[name] for run in runs) for name in ("steps", "tokens", "hours"))
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    spent = f"{count}, {steps} steps, {tokens:,} target tokens, {hours:.2f} hours"
    return f"\n- Before that, for the weights that it started from: {spent}."
