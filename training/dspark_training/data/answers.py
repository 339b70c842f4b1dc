"""Answers by the target itself, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dspark_training.data.chat import ChatTemplate, TemplateMismatchError, Turn
from dspark_training.data.conversation import Prompt
from dspark_training.data.dialogue import Dialogue, finish, open_dialogues
from dspark_training.data.generate import Completion, Request, complete
from dspark_training.data.skipped import Skipped
from dspark_training.data.store import SampleStore
from dspark_training.target import Target

Progress = Callable[[int, int], None]  # (done, total)


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
    thinking: bool | None = None,
    progress: Progress = lambda done, total: None,
) -> SampleStore:
    """Answer every prompt that the store does not hold yet; a second call goes on where the first stopped.

    What cannot be used (over-long prompts, empty answers, conversations that the chat template refuses at some turn) is
    noted in `<store>.skipped.jsonl`.

    Args:
        greedy_share: share of prompts answered greedily; the rest is drawn at `temperature`.
        max_prompt_tokens: longer prompts are skipped; a conversation that grows longer ends there.
        max_samples: stop when the store holds that many prompts; they are taken in random order.
        thinking: passed to the chat template as `enable_thinking`; None leaves it to the template.

    Raises:
        DataError: the target has no chat template, not one prompt can be used, the store holds another tokenizer's ids,
            or the disk is full.
    """
    store = SampleStore(store_path)
    skipped = Skipped(store.path.with_suffix(".skipped.jsonl"))
    dialogues = open_dialogues(
        ChatTemplate.of(target, thinking),
        prompts,
        store,
        skipped,
        greedy_share=greedy_share,
        temperature=temperature,
        max_prompt_tokens=max_prompt_tokens,
        seed=seed,
        max_samples=max_samples,
    )
    done = len(store.prompt_keys())
    total = done + len(dialogues)
    generator = torch.Generator().manual_seed(seed + done)
    # Super-batches in random order keep the store representative if the run is stopped early.
    span = 4 * batch_size
    for start in range(0, len(dialogues), span):
        waiting = {d.prompt.key: d for d in dialogues[start : start + span]}
        while waiting:
            requests = [Request(key, d.prompt_ids, d.temperature, max_new_tokens) for key, d in waiting.items()]
            for batch in complete(target, requests, batch_size=batch_size, generator=generator):
                for completion in batch:
                    dialogue = waiting[completion.key]
                    try:
                        if _take(dialogue, completion, target, max_prompt_tokens):
                            continue
                        finish(dialogue, store, skipped, thinking=thinking)
                        done += 1
                    except TemplateMismatchError as error:
                        skipped.add(error.problem, dialogue.prompt.key, dialogue.prompt._asdict())
                    del waiting[completion.key]
                progress(done, total)
    return store


def _take(dialogue: Dialogue, completion: Completion, target: Target, max_prompt_tokens: int) -> bool:
    """Add the completion; True if the next turn should be answered too."""
    words = completion.answer_ids[: -1 if completion.stopped else None]
    text = target.tokenizer.decode(words, skip_special_tokens=True)
    more = dialogue.add(
        Turn(dialogue.prompt_ids, completion.answer_ids),
        {"role": "assistant", "content": text},
        whole=completion.stopped,
    )
    return more and len(dialogue.prompt_ids) <= max_prompt_tokens
