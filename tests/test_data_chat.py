"""Which tokens the assistant wrote, against spans counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
from dspark_training.data.chat import ChatTemplate, TemplateMismatchError, Turn, join_turns
from dspark_training.data.conversation import Conversation, Prompt, parse_row
from dspark_training.data.dialogue import Dialogue

from dspark_serving.errors import DataError
from tests.chat_tokenizers import (
    CHATML,
    ENDS,
    GEMMA,
    LLAMA,
    MARKED,
    OPEN_ENDED,
    TOOLS,
    UNLIKE_ITS_PROMPT,
    word_tokenizer,
)

SYSTEM = {"role": "system", "content": "be kind"}
TWO_TURNS = (
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "hello you all"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
)
TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "oslo"}}}
ASKED = {"role": "user", "content": "weather in oslo"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "cold"}
SAYS = {"role": "assistant", "content": "so cold"}


def chat(template: str, thinking: bool | None = None) -> ChatTemplate:
    tokenizer = word_tokenizer(template)
    return ChatTemplate(tokenizer, tokenizer.convert_tokens_to_ids(list(ENDS)), thinking)


def said(*messages: dict[str, Any], tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation("chat", messages, tools)


def supervised(template: ChatTemplate, conversation: Conversation) -> list[list[str]]:
    """The words of each span, over all passages."""
    return [
        template.tokenizer.convert_ids_to_tokens(ids[start:end])
        for ids, spans in template.passages(conversation)
        for start, end in spans
    ]


@pytest.mark.parametrize(
    ("template", "messages", "length", "spans"),
    [
        # <|im_start|> system be kind <|im_end|> | <|im_start|> user hi there <|im_end|> | <|im_start|> assistant | ...
        (CHATML, (SYSTEM, *TWO_TURNS), 25, [(12, 16), (22, 25)]),
        (MARKED, (SYSTEM, *TWO_TURNS), 25, [(12, 16), (22, 25)]),
        # <s> | <|start_header_id|> user <|end_header_id|> hi there <|eot_id|> | <|start..|> assistant <|end..|> | ...
        (LLAMA, TWO_TURNS, 1 + 6 + 7 + 5 + 6, [(10, 14), (22, 25)]),
        # <s> | <start_of_turn> user hi there <end_of_turn> | <start_of_turn> model | ...
        (GEMMA, TWO_TURNS, 1 + 5 + 6 + 4 + 5, [(8, 12), (18, 21)]),
    ],
    ids=["chatml", "generation spans", "llama", "gemma"],
)
def test_spans_of_two_turns(
    template: str, messages: tuple[dict[str, Any], ...], length: int, spans: list[tuple[int, int]]
) -> None:
    (passage,) = chat(template).passages(said(*messages))
    assert len(passage.ids) == length
    assert passage.spans == spans
    answers = supervised(chat(template), said(*messages))
    assert [words[:-1] for words in answers] == [["hello", "you", "all"], ["so", "long"]]
    assert all(words[-1] in ENDS for words in answers)


def test_calls_of_tools_are_supervised_and_their_results_are_not() -> None:
    words = supervised(chat(TOOLS, thinking=False), said(ASKED, CALLS, RESULT, SAYS, tools=(TOOL,)))
    assert words == [["<tool_call>", "weather", "oslo", "</tool_call>", "<|im_end|>"], ["so", "cold", "<|im_end|>"]]
    tools = chat(TOOLS).prompt_ids([ASKED], [TOOL])
    assert tools[:4] == chat(TOOLS).tokenizer.convert_tokens_to_ids(["<|im_start|>", "system", "weather", "<|im_end|>"])


def test_old_answers_rendered_otherwise_give_a_passage_of_their_own() -> None:
    """Each passage is what the target sees at that turn: the thinking of the first is gone from the second."""
    template = chat(TOOLS)
    first, second = template.passages(said(*TWO_TURNS))
    show = template.tokenizer.convert_ids_to_tokens
    assert show(first.ids)[first.spans[0][0] :] == ["<think>", "</think>", "hello", "you", "all", "<|im_end|>"]
    assert first.spans == [(7, 13)]
    assert "<think>" not in show(second.ids)[: second.spans[0][0]]
    assert second.spans == [(len(second.ids) - 5, len(second.ids))]


def test_thinking_is_left_to_the_target_or_to_the_template() -> None:
    on, off = chat(TOOLS, True), chat(TOOLS, False)
    question = said(*TWO_TURNS[:2])
    assert supervised(on, question)[0][0] == "<think>"
    assert supervised(off, question)[0][0] == "hello"


@pytest.mark.parametrize(
    ("template", "message"),
    [(OPEN_ENDED, "without a stop token"), (UNLIKE_ITS_PROMPT, "otherwise than the prompt")],
)
def test_templates_that_do_not_show_the_assistant_are_refused(template: str, message: str) -> None:
    with pytest.raises(TemplateMismatchError, match=message) as caught:
        chat(template).passages(said(*TWO_TURNS))
    assert "{% generation %}" in caught.value.fix


def test_other_conversations_without_spans_are_refused() -> None:
    with pytest.raises(TemplateMismatchError, match="no system role"):
        chat(GEMMA).passages(said(SYSTEM, *TWO_TURNS))
    with pytest.raises(DataError, match="no assistant message"):
        chat(CHATML).passages(said(TWO_TURNS[0]))
    never = MARKED.replace("m.role == 'assistant'", "m.role == 'model'")
    with pytest.raises(TemplateMismatchError, match="marks no token"):
        chat(never).passages(said(*TWO_TURNS))
    with pytest.raises(TemplateMismatchError, match="no chat template"):
        ChatTemplate(word_tokenizer(None), [1])


def test_turns_join_only_where_every_token_agrees() -> None:
    assert join_turns([Turn([1, 2], [3]), Turn([1, 2, 3, 4], [5, 6])]) == [([1, 2, 3, 4, 5, 6], [(2, 3), (4, 6)])]
    assert join_turns([Turn([1, 2], [3]), Turn([1, 2, 9, 4], [5])]) == [
        ([1, 2, 3], [(2, 3)]),
        ([1, 2, 9, 4, 5], [(4, 5)]),
    ]


def test_a_dialogue_asks_turn_by_turn_with_the_answers_so_far() -> None:
    template = chat(CHATML)
    show = template.tokenizer.convert_ids_to_tokens
    prompt = Prompt.of(said(SYSTEM, *TWO_TURNS))
    assert [m["role"] for m in prompt.messages] == ["system", "user", "user"]
    dialogue = Dialogue(prompt, template, 0.0)
    answer = {"role": "assistant", "content": "kind you"}
    assert dialogue.add(template.turn(dialogue.messages, (), answer), answer, whole=True)
    assert [m["content"] for m in dialogue.messages] == ["be kind", "hi there", "kind you", "bye"]
    assert not dialogue.add(template.turn(dialogue.messages, (), answer), answer, whole=True)
    (sample,) = dialogue.samples(thinking=True)
    assert [show(sample.ids[a:b]) for a, b in sample.spans] == [["kind", "you", "<|im_end|>"]] * 2
    assert sample.thinking is True
    cut = Dialogue(prompt, template, 0.0)
    assert not cut.add(Turn(cut.prompt_ids, [5]), answer, whole=False), "nothing is asked behind a cut answer"


def test_given_tool_calls_stay_and_only_the_answer_behind_them_is_asked_for() -> None:
    prompt = Prompt.of(said(ASKED, CALLS, RESULT, SAYS, tools=(TOOL,)))
    assert prompt.messages == (ASKED, CALLS, RESULT)
    assert list(prompt.openings()) == [3]
    undecided = Prompt.of(parse_row({"messages": [ASKED, CALLS], "tools": [TOOL]}))
    assert undecided.messages == (ASKED,), "a call without a result is the target's own to make"
