"""Prompts that the target writes itself, for those who have none."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from dspark_serving.errors import DataError
from dspark_training.data.answers import Progress
from dspark_training.data.chat import ChatTemplate
from dspark_training.data.conversation import Prompt
from dspark_training.data.generate import Completion, Request, complete
from dspark_training.data.jsonl import append_rows, drop_torn_line, json_lines
from dspark_training.data.prompts import save_prompts
from dspark_training.data.text import Duplicates, degenerate
from dspark_training.target import Target

_LONGEST = 120  # tokens; a longer message is dropped
_TEMPERATURE = 0.8
_TOPIC = "{topic}"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DomainSeeds(_Frozen):
    """How messages of one domain begin."""

    openings: tuple[str, ...] = Field(min_length=1, description='first words; "" leaves all words to the target')
    topics: tuple[str, ...] = Field((), description="one of them is put where an opening says {topic}")


class Seeds(RootModel[dict[str, DomainSeeds]]):
    """Domain -> its seeds."""


class Written(NamedTuple):
    """What became of one attempt."""

    attempt: str  # domain/number
    domain: str
    text: str
    dropped: str | None  # the reason, None for a usable message


def read_seeds(path: Path) -> Seeds:
    """Read a JSON file: domain -> {"openings": [...], "topics": [...]}.

    Raises:
        DataError: the file is missing or has another form; names the first wrong field.
    """
    try:
        seeds = Seeds.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", expected="a JSON file of seeds", fix="Check the path.") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{path}: {field} is wrong ({first['msg']})",
            expected='domain -> {"openings": [...], "topics": [...]}',
            fix="Correct that field.",
        ) from None
    for domain, kind in seeds.root.items():
        if not kind.topics and any(_TOPIC in opening for opening in kind.openings):
            raise DataError(
                f"{path}: {domain} has openings with {_TOPIC} and no topics", expected="topics", fix="Add some."
            )
    return seeds


def write_prompts(
    target: Target,
    seeds: Seeds,
    per_domain: Mapping[str, int],
    path: Path,
    *,
    seed: int,
    batch_size: int,
    progress: Progress = lambda done, total: None,
) -> list[Prompt]:
    """Let the target write user messages that begin as the seeds say.

    The chat template's user prefix and an opening are continued by the target. Messages that do not end by
    themselves, degenerate ones, duplicates and near duplicates are dropped, so fewer than asked for come back.

    Args:
        per_domain: domain -> messages to write.
        path: JSONL of the usable messages. `<path>.attempts.jsonl` beside it has all, with the reason where one was
            dropped; a call that was stopped goes on behind those.

    Raises:
        DataError: a domain has no seeds, or not one message was usable.
    """
    unknown = sorted(set(per_domain) - set(seeds.root))
    if unknown:
        raise DataError(
            f"no seeds for {', '.join(unknown)}", expected=f"domains of {sorted(seeds.root)}", fix="Add them."
        )
    attempts = _attempts(seeds, per_domain, seed)
    log = path.with_suffix(".attempts.jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    drop_torn_line(log)
    written = {row["attempt"]: Written(**row) for _, row in json_lines(log)} if log.exists() else {}
    seen = Duplicates()
    for earlier in written.values():
        if earlier.dropped is None:
            seen.add(earlier.text)
    template = ChatTemplate.of(target)
    requests = [
        Request(name, template.continuation_ids(template.user_prefix() + head), _TEMPERATURE, _LONGEST)
        for name, (_, head) in attempts.items()
        if name not in written
    ]
    # In random order, so that what a stopped run leaves has all domains.
    random.Random(seed).shuffle(requests)
    generator = torch.Generator().manual_seed(seed + len(written))
    for start in range(0, len(requests), 4 * batch_size):
        part = requests[start : start + 4 * batch_size]
        for batch in complete(target, part, batch_size=batch_size, generator=generator):
            new = [_judge(target, *attempts[c.key], c, seen) for c in batch]
            append_rows(log, (w._asdict() for w in new))
            written |= {w.attempt: w for w in new}
            progress(sum(name in written for name in attempts), len(attempts))
    usable = [Prompt.ask(w.domain, w.text) for w in written.values() if w.dropped is None]
    if not usable:
        raise DataError(
            f"not one of {len(written)} messages by the target is usable, see {log}",
            expected="messages that end by themselves and differ",
            fix="Try other openings, or pass prompts.",
        )
    save_prompts(path, usable)
    return usable


def _attempts(seeds: Seeds, per_domain: Mapping[str, int], seed: int) -> dict[str, tuple[str, str]]:
    """Name -> (domain, first words); an attempt is the same however many others there are."""
    attempts = {}
    for domain, count in per_domain.items():
        kind = seeds.root[domain]
        for i in range(count):
            rng = random.Random(f"{seed} {domain} {i}")
            head = rng.choice(kind.openings)
            if _TOPIC in head:
                head = head.replace(_TOPIC, rng.choice(kind.topics))
            attempts[f"{domain}/{i}"] = (domain, head)
    return attempts


def _judge(target: Target, domain: str, head: str, completion: Completion, seen: Duplicates) -> Written:
    words = completion.answer_ids[: -1 if completion.stopped else None]
    text = (head + target.tokenizer.decode(words)).strip()
    reason = None if completion.stopped else "does not end"
    reason = reason or degenerate(text) or seen.add(text)
    return Written(completion.key, domain, text, reason)
