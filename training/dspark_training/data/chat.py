"""Chat templates: conversations as token ids, and which of them the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from dspark_serving.errors import DataError
from dspark_training.data.conversation import Conversation, Message, RowError
from dspark_training.target import Target

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateMismatchError(DataError):
    """A chat template cannot render a conversation, or does not show where the assistant speaks."""


class Turn(NamedTuple):
    """One answer, behind everything the target had read before it."""

    prompt_ids: list[int]
    answer_ids: list[int]  # ends with the token that ends the turn, unless it was cut


class Passage(NamedTuple):
    """Token ids with the half-open ranges that the assistant wrote."""

    ids: list[int]
    spans: list[tuple[int, int]]


def join_turns(turns: Iterable[Turn]) -> list[Passage]:
    """One passage for turns that continue each other token for token; a new one where they do not.

    Templates that render an old answer otherwise than a new one (without its thinking) give several passages,
    each of which is what the target really sees at that turn.
    """
    passages: list[Passage] = []
    for prompt_ids, answer_ids in turns:
        if not passages or prompt_ids[: len(passages[-1].ids)] != passages[-1].ids:
            passages.append(Passage([], []))
        spans = passages.pop().spans
        whole = prompt_ids + answer_ids
        passages.append(Passage(whole, [*spans, (len(prompt_ids), len(whole))]))
    return passages


class ChatTemplate:
    """A tokenizer's chat template with the tokens that end a turn.

    Args:
        stop_ids: ids with which the target ends its answers.
        thinking: passed to the template as `enable_thinking`; None leaves it to the template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int], thinking: bool | None = None
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateMismatchError(
                "the tokenizer has no chat template",
                expected="an instruction-tuned target",
                fix="Put chat_template.jinja into the target's directory.",
            )
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.thinking = thinking
        self._settings: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}

    @classmethod
    def of(cls, target: Target, thinking: bool | None = None) -> ChatTemplate:
        return cls(target.tokenizer, target.stop_ids, thinking)

    @classmethod
    def load(cls, checkpoint: str | Path, thinking: bool | None = None) -> ChatTemplate:
        """The template of a checkpoint, without its weights.

        Raises:
            DataError: `checkpoint` has no tokenizer, or no chat template.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        except (OSError, ValueError) as error:
            raise DataError(
                f"no tokenizer at {checkpoint} ({error})",
                expected="the target's checkpoint directory",
                fix="Pass --target with the model that the answers come from.",
            ) from error
        try:
            stop = GenerationConfig.from_pretrained(checkpoint).eos_token_id
        except OSError:  # a checkpoint may come without it
            stop = None
        stop = tokenizer.eos_token_id if stop is None else stop
        return cls(tokenizer, stop if isinstance(stop, list) else [stop], thinking)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids up to where the assistant begins.

        Raises:
            TemplateMismatchError: the template refuses the conversation.
        """
        return self.continuation_ids(self._text(messages, tools, opening=True))

    def turn(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], answer: Message) -> Turn:
        """The answer as the template renders it behind `messages`, ended by a stop token.

        Raises:
            TemplateMismatchError: the template does not show where the answer begins or ends.
        """
        before, whole = self._text(messages, tools, opening=True), self._text([*messages, answer], tools)
        if not whole.startswith(before):
            raise _no_spans(
                "the chat template renders an answered conversation otherwise than the prompt of its answer",
                f"{before[-40:]!r} at its end",
            )
        # Cut at the text, not at the ids: the target continues the ids of the prompt whatever a tokenizer would merge.
        answer_ids = self.continuation_ids(whole[len(before) :])
        end = self._first_stop(answer_ids)
        if end is None:
            raise _no_spans("the chat template ends an answer without a stop token", f"one of {sorted(self.stop_ids)}")
        return Turn(self.continuation_ids(before), answer_ids[:end])

    def passages(self, conversation: Conversation) -> list[Passage]:
        """A whole conversation with what the assistant wrote in it.

        The template's own {% generation %} spans are taken where it has them; else each answer is rendered behind
        its prompt.

        Raises:
            TemplateMismatchError: neither works; says what to do.
            RowError: there is no assistant message.
        """
        _, messages, tools = conversation
        if all(m["role"] != "assistant" for m in messages):
            raise RowError("no assistant message")
        if _GENERATION.search(self.tokenizer.get_chat_template(tools=list(tools) or None)):
            return [self._marked(messages, tools)]
        turns = [
            self.turn(messages[:i], tools, message)
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        return join_turns(turns)

    def user_prefix(self) -> str:
        """The template's text up to where the first user's words begin."""
        mark = "\x02"
        text = self._text([{"role": "user", "content": mark}], ())
        return text[: text.index(mark)]

    def continuation_ids(self, text: str) -> list[int]:
        """Ids of text that stands behind other ids: nothing is put in front of it."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _marked(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Passage:
        out = self._apply(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
        spans = []
        start = 0
        for i in range(1, len(mask) + 1):
            if i == len(mask) or mask[i] != mask[i - 1]:
                if mask[i - 1]:
                    spans.append((start, start + (self._first_stop(ids[start:i]) or i - start)))
                start = i
        if not spans:
            raise _no_spans("the chat template's {% generation %} marks no token", "the assistant's text inside it")
        return Passage(ids, spans)

    def _first_stop(self, ids: Sequence[int]) -> int | None:
        """Length up to the first stop token, included: what a template writes behind it is not the target's."""
        return next((i for i, token in enumerate(ids, start=1) if token in self.stop_ids), None)

    def _text(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, opening: bool = False) -> str:
        return str(self._apply(messages, tools, tokenize=False, add_generation_prompt=opening))

    def _apply(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, **options, **self._settings
            )
        except (TemplateError, TypeError) as error:
            raise TemplateMismatchError(
                f"the chat template refuses the conversation ({error})",
                expected="roles, order and content that the target was trained with",
                fix="Leave such conversations out.",
            ) from error


def _no_spans(problem: str, expected: str) -> TemplateMismatchError:
    return TemplateMismatchError(
        problem,
        expected=expected,
        fix="Mark the assistant's text in the chat template with {% generation %} ... {% endgeneration %}.",
    )
