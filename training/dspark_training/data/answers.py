"""From prompts (given, or written by the target itself) to a store of answers by the target."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dspark_training.data.generate import Completion, Request, complete
from dspark_training.data.store import Prompt, Sample, SampleStore
from dspark_training.target import Target

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (done, total)
_PROMPT_TOKENS = 120  # a synthesised user message that is longer is dropped
_PROMPT_TEMPERATURE = 0.8


def write_prompts(
    target: Target,
    openings: dict[str, list[str]],
    per_domain: dict[str, int],
    *,
    seed: int,
    batch_size: int,
    progress: Progress = lambda done, total: None,
) -> list[Prompt]:
    """Let the target write user messages that begin with the given openings.

    The chat template's user prefix plus an opening is continued by the target; messages that do not end by
    themselves and duplicates are dropped, so fewer than asked for may come back.

    Args:
        openings: domain -> first words of a user message.
        per_domain: domain -> how many messages to draw.
    """
    rng = random.Random(seed)
    requests, heads = [], {}
    for domain, count in per_domain.items():
        for i in range(count):
            head = rng.choice(openings[domain])
            key = f"{domain}/{i}"
            ids = target.tokenizer(target.user_prefix() + head, add_special_tokens=False).input_ids
            heads[key] = (domain, head)
            requests.append(Request(key, ids, _PROMPT_TEMPERATURE, _PROMPT_TOKENS))
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Prompt] = {}
    written = 0
    for batch in complete(target, requests, batch_size=batch_size, generator=generator):
        for prompt in (_as_prompt(target, *heads[c.key], c) for c in batch if c.stopped):
            found[prompt.key] = prompt
        written += len(batch)
        progress(written, len(requests))
    log.info("the target wrote %d usable prompts of %d", len(found), len(requests))
    return list(found.values())


def _as_prompt(target: Target, domain: str, head: str, completion: Completion) -> Prompt:
    tail = target.tokenizer.decode(completion.answer_ids[:-1])
    return Prompt(domain, (head + tail).strip())


def with_suffix(prompts: Sequence[Prompt], domain: str, suffix: str, share: float, *, seed: int) -> list[Prompt]:
    """Append `suffix` to a random `share` of one domain's prompts (how a benchmark asks its questions)."""
    rng = random.Random(seed)
    return [p._replace(text=p.text + suffix) if p.domain == domain and rng.random() < share else p for p in prompts]


def answer(
    target: Target,
    prompts: Sequence[Prompt],
    store_path: str | Path,
    *,
    greedy_share: float,
    temperature: float,
    max_new_tokens: int,
    max_prompt_tokens: int,
    batch_size: int,
    seed: int,
    max_samples: int | None = None,
    progress: Progress = lambda done, total: None,
) -> SampleStore:
    """Answer every prompt that the store does not hold yet; a second call goes on where the first stopped.

    Args:
        max_samples: stop when the store holds that many; prompts are taken in random order.
        greedy_share: share of answers decoded greedily; the rest is drawn at `temperature`.
    """
    store = SampleStore(store_path)
    done = store.keys()
    rng = random.Random(seed)
    by_key: dict[str, Prompt] = {}
    requests = []
    for prompt in prompts:
        heat = 0.0 if rng.random() < greedy_share else temperature
        if prompt.key in done or prompt.key in by_key:
            continue
        ids = target.chat_ids(prompt.text)
        if len(ids) > max_prompt_tokens:
            log.warning("skipped a prompt of %d tokens (limit %d)", len(ids), max_prompt_tokens)
            continue
        by_key[prompt.key] = prompt
        requests.append(Request(prompt.key, ids, heat, max_new_tokens))
    rng.shuffle(requests)
    if max_samples is not None:
        requests = requests[: max(0, max_samples - len(done))]
    total = len(done) + len(requests)
    generator = torch.Generator().manual_seed(seed + len(done))
    # Super-batches in random order keep the store representative if the run is stopped early.
    span = 4 * batch_size
    for start in range(0, len(requests), span):
        part = {r.key: r for r in requests[start : start + span]}
        for batch in complete(target, list(part.values()), batch_size=batch_size, generator=generator):
            store.append(_sample(by_key[c.key], part[c.key], c) for c in batch)
            done |= {c.key for c in batch}
            progress(len(done), total)
    return store


def _sample(prompt: Prompt, request: Request, completion: Completion) -> Sample:
    ids = request.prompt_ids + completion.answer_ids
    return Sample(prompt.key, prompt.domain, request.temperature, ids, [(len(request.prompt_ids), len(ids))])
