"""A work directory: which run it belongs to, and whether the answers in it are complete."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspark_serving.errors import DataError, OptionError
from dspark_training import checkpoint
from dspark_training.config import RunConfig
from dspark_training.data.store import Sample
from dspark_training.data.tokens import load_samples
from dspark_training.disk import replace_text

RUN, SAMPLES, WRITTEN, ATTEMPTS = "run.json", "samples.jsonl", "written_prompts.jsonl", "written_prompts.attempts.jsonl"
_COMPLETE = "samples.complete.json"
_FIX = "Choose another --work directory, or delete this one."
# These may always change: they decide how fast and where a run goes on, not what is learned.
_FREE = {
    "threads",
    "tensorboard",
    "save_every_seconds",
    "licence",
    "data.batch_size",
    "features.directory",
    "features.cap_gb",
    "features.layer_ids",
}
_NOT_OF_ANSWERS = {"data.samples", "data.batch_size", "data.validation_share"}


def claim(work: Path, origin: dict[str, Any]) -> None:
    """Note in run.json which run the directory belongs to, unless it holds what another run has left.

    Answers belong to a target and to the fields that they come from; a checkpoint belongs to a target, all fields and
    the content of the data files (of those that are still there: complete answers need no prompts).

    Args:
        origin: of `recipe.provenance`.

    Raises:
        OptionError: the directory was made with another recipe, target or data; names the first field or file that
            differs.
    """
    trained = checkpoint.latest(work / "checkpoints") is not None
    answered = origin["recipe"]["data"]["samples"] is None and any((work / n).exists() for n in (SAMPLES, ATTEMPTS))
    if (work / RUN).exists() and (trained or answered):
        _require_same(work / RUN, origin, trained=trained)
    write_run(work, origin)


def write_run(work: Path, origin: dict[str, Any]) -> None:
    """Write run.json: complete, or as it was before."""
    _write(work / RUN, origin)


def is_complete(work: Path) -> bool:
    """Whether every prompt was answered; some of the answers may have been unusable."""
    return (work / _COMPLETE).exists()


def mark_complete(work: Path, samples: int) -> None:
    """Note that every prompt was answered and how many samples that gave: a later call has these and no others."""
    _write(work / _COMPLETE, {"samples": samples})


def complete_samples(work: Path) -> Sequence[Sample]:
    """The samples of a directory whose answers are complete.

    Raises:
        DataError: some of them are missing or damaged.
    """
    samples = load_samples(work / SAMPLES)
    expected = json.loads((work / _COMPLETE).read_text())["samples"]
    if len(samples) != expected:
        raise DataError(
            f"{work / SAMPLES} holds {len(samples)} samples",
            expected=f"the {expected} that {_COMPLETE} counts",
            fix=f"Put the file back, or delete {work / _COMPLETE} to have the prompts answered again.",
        )
    return samples


def _require_same(path: Path, origin: dict[str, Any], *, trained: bool) -> None:
    made, config = _read(path)
    before, now = _fields(config), _fields(RunConfig.model_validate(origin["recipe"]))
    for field in [*now, *before]:
        if _is_bound(field, trained=trained) and before.get(field) != now.get(field):
            raise OptionError(
                f"{path.parent} was made with {field} {json.dumps(before.get(field))}, "
                f"this run has {json.dumps(now.get(field))}",
                expected="the recipe that the work directory was made with",
                fix=_FIX,
            )
    ours = origin["target"]
    theirs = made.get("target", ours)
    if theirs["fingerprint"] != ours["fingerprint"]:
        raise OptionError(
            f"{path.parent} was made with the target {theirs['name']} ({theirs['fingerprint']}), "
            f"this one is {ours['name']} ({ours['fingerprint']})",
            expected="the same configuration and weights, read by the same version of transformers",
            fix=_FIX,
        )
    files, hashes = origin["data_sha256"], made.get("data_sha256", {})
    changed = next((file for file in files if files[file] != hashes.get(file, files[file])), None)
    if trained and changed is not None:
        raise OptionError(
            f"{changed} has changed since {path.parent} was trained on it",
            expected=f"the content whose sha256 {path} names",
            fix="Put the file back, choose another --work directory, or delete this one.",
        )


def _is_bound(field: str, *, trained: bool) -> bool:
    if trained:
        return field not in _FREE
    return field == "seed" or (field.startswith("data.") and field not in _NOT_OF_ANSWERS)


def _read(path: Path) -> tuple[dict[str, Any], RunConfig]:
    try:
        made = json.loads(path.read_text())
        return made, RunConfig.model_validate(made["recipe"])
    except (ValueError, TypeError, KeyError) as error:
        raise OptionError(
            f"{path} does not say what the directory was made with ({str(error).splitlines()[0]})",
            expected="the recipe of a run",
            fix=_FIX,
        ) from None


def _fields(config: RunConfig) -> dict[str, Any]:
    """Every field by its name on the command line."""
    fields: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        fields |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
    return fields


def _write(path: Path, content: dict[str, Any]) -> None:
    replace_text(path, json.dumps(content, indent=1))
