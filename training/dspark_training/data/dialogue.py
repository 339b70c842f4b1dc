"""A prompt while the target answers it, one answer after the other: in process or through a server."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dspark_serving.errors import DataError
from dspark_training.data.chat import ChatTemplate, TemplateMismatchError, Turn, join_turns
from dspark_training.data.conversation import Message, Prompt
from dspark_training.data.skipped import Skipped
from dspark_training.data.store import LEAST_SUPERVISED, Sample, SampleStore
from dspark_training.data.tokenizer import fingerprint


class Dialogue:
    """Holds the answers so far and knows what the target reads next.

    Args:
        temperature: of all answers; 0 is greedy.
    """

    def __init__(self, prompt: Prompt, template: ChatTemplate, temperature: float) -> None:
        self.prompt = prompt
        self.temperature = temperature
        self._template = template
        self._openings = list(prompt.openings())
        self._turns: list[Turn] = []
        self._answers: list[Message] = []
        self.prompt_ids: list[int] = template.prompt_ids(self.messages, prompt.tools)

    @property
    def messages(self) -> list[Message]:
        """What was said before the next answer."""
        given = self.prompt.messages
        said: list[Message] = []
        start = 0
        for end, answer in zip(self._openings, self._answers, strict=False):
            said += [*given[start:end], answer]
            start = end
        return said + list(given[start : self._openings[len(self._answers)]])

    def add(self, turn: Turn, answer: Message, *, whole: bool) -> bool:
        """Take an answer; True if another one is wanted.

        Args:
            whole: False for an answer that was cut: nothing is asked behind it.
        """
        self._turns.append(turn)
        self._answers.append(answer)
        if not whole or len(self._answers) == len(self._openings):
            return False
        self.prompt_ids = self._template.prompt_ids(self.messages, self.prompt.tools)
        return True

    def samples(self, *, top_p: float = 1.0, thinking: bool | None = None) -> list[Sample]:
        """The finished conversation; several samples where old answers are rendered otherwise than new ones."""
        return [
            Sample(
                f"{self.prompt.key}.{i}" if i else self.prompt.key,
                self.prompt.domain,
                self.temperature,
                passage.ids,
                passage.spans,
                top_p,
                thinking,
            )
            for i, passage in enumerate(join_turns(self._turns))
        ]


def open_dialogues(
    template: ChatTemplate,
    prompts: Sequence[Prompt],
    store: SampleStore,
    skipped: Skipped,
    *,
    greedy_share: float,
    temperature: float,
    max_prompt_tokens: int,
    seed: int,
    max_samples: int | None,
) -> list[Dialogue]:
    """The prompts that the store does not hold yet, in random order, each with its temperature.

    Raises:
        DataError: there are prompts, but the store is empty and none can be used; or it holds another tokenizer's ids.
    """
    store.claim(fingerprint(template.tokenizer))
    done = store.prompt_keys()
    rng = random.Random(seed)
    dialogues: dict[str, Dialogue] = {}
    for prompt in prompts:
        heat = 0.0 if rng.random() < greedy_share else temperature
        if prompt.key in done or prompt.key in dialogues:
            continue
        try:
            dialogue = Dialogue(prompt, template, heat)
        except TemplateMismatchError as error:
            skipped.add(error.problem, prompt.key, prompt._asdict())
            continue
        if len(dialogue.prompt_ids) > max_prompt_tokens:
            skipped.add(f"prompt of more than {max_prompt_tokens} tokens", prompt.key, prompt._asdict())
            continue
        dialogues[prompt.key] = dialogue
    if prompts and not done and not dialogues:
        raise DataError(
            f"not one of {len(prompts)} prompts can be used: {skipped.summary()}",
            expected="prompts that the chat template takes, within the length limit",
            fix="Look into that file.",
        )
    chosen = list(dialogues.values())
    rng.shuffle(chosen)
    return chosen if max_samples is None else chosen[: max(0, max_samples - len(done))]


def finish(
    dialogue: Dialogue, store: SampleStore, skipped: Skipped, *, top_p: float = 1.0, thinking: bool | None = None
) -> None:
    """Keep a conversation, or note that nothing in it can be trained on."""
    samples = dialogue.samples(top_p=top_p, thinking=thinking)
    usable = [s for s in samples if s.supervised >= LEAST_SUPERVISED]
    store.append(usable)
    if not usable:
        skipped.add("empty answer", dialogue.prompt.key, dialogue.prompt._asdict())
