"""Answers through an OpenAI-compatible server that fails in every way that servers do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dspark_training.data.chat import ChatTemplate
from dspark_training.data.conversation import Prompt
from dspark_training.data.remote import Server, ServerLostError, answer_remotely
from dspark_training.data.store import Sample, SampleStore

from dspark_serving.errors import DataError
from tests.chat_tokenizers import CHATML, TOOLS, word_tokenizer
from tests.openai_server import OpenAIServer, openai_server

WORDS = "re: " + " ".join(f"q{i}" for i in range(40))


def template(jinja: str = CHATML, thinking: bool | None = None) -> ChatTemplate:
    tokenizer = word_tokenizer(jinja, WORDS)
    return ChatTemplate(tokenizer, [tokenizer.eos_token_id], thinking)


CHAT = template()


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with openai_server(lambda asked: len(CHAT.prompt_ids(asked["messages"]))) as running:
        yield running


def prompts(n: int) -> list[Prompt]:
    return [Prompt.ask("chat", f"q{i}") for i in range(n)]


def ask(
    server: OpenAIServer, asked: list[Prompt], path: Path, chat: ChatTemplate = CHAT, **options: Any
) -> SampleStore:
    settings: dict[str, Any] = {"greedy_share": 0.5, "temperature": 0.8, "max_new_tokens": 9, "max_prompt_tokens": 40}
    connection = Server(server.url, concurrency=4, retries=options.pop("retries", 2), timeout=5)
    return answer_remotely(connection, chat, asked, path, seed=1, **settings | options)


def text(sample: Sample, chat: ChatTemplate = CHAT) -> list[str]:
    return [" ".join(chat.tokenizer.convert_ids_to_tokens(sample.ids[a:b])) for a, b in sample.spans]


def errors(path: Path) -> dict[str, str]:
    """Last user message -> reason."""
    rows = [json.loads(line) for line in path.with_suffix(".errors.jsonl").read_text().splitlines()]
    return {row["row"]["messages"][-1]["content"]: row["reason"] for row in rows}


def test_answers_of_a_server_are_samples_of_the_template(server: OpenAIServer, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    store = ask(
        server,
        prompts(20),
        tmp_path / "s.jsonl",
        template(thinking=False),
        top_p=0.9,
        progress=lambda done, total: progress.append((done, total)),
    )
    samples = {s.key: s for s in store}
    assert set(samples) == {p.key for p in prompts(20)}
    for i, prompt in enumerate(prompts(20)):
        sample = samples[prompt.key]
        # <|im_start|> user q <|im_end|> <|im_start|> assistant | re: q <|im_end|>
        assert sample.spans == [(6, 9)]
        assert text(sample) == [f"re: q{i} <|im_end|>"]
        assert (sample.top_p, sample.thinking) == (0.9, False)
    assert {s.temperature for s in store} == {0.0, 0.8}
    by_text = {r["messages"][-1]["content"]: r for r in server.requests}
    assert all(by_text[f"q{i}"]["temperature"] == samples[p.key].temperature for i, p in enumerate(prompts(20)))
    one = server.requests[0]
    assert (one["model"], one["top_p"], one["max_tokens"]) == ("tiny", 0.9, 9)
    assert one["chat_template_kwargs"] == {"enable_thinking": False}
    assert 1 < server.most_running <= 4
    assert progress[-1] == (20, 20)


def test_faults_are_retried_or_written_down_and_a_rerun_asks_for_the_rest_only(
    server: OpenAIServer, tmp_path: Path
) -> None:
    server.faults = {
        "q0": [500],  # once: the retry succeeds
        "q1": ["hang up"],
        "q2": [500, 503, 500],  # more often than there are retries
        "q3": ["hang up"] * 3,
        "q4": ["no json"],
        "q5": ["no choices"],
        "q6": ["empty"],
        "q7": [400],
        "q8": ["length"],
    }
    path = tmp_path / "s.jsonl"
    store = ask(server, prompts(10), path)
    reasons = {
        "q2": "the server answered 500",
        "q3": "the server hung up",
        "q4": "a malformed reply",
        "q5": "a malformed reply",
        "q6": "empty answer",
        "q7": "the server answered 400",
    }
    assert errors(path) == reasons
    assert store.prompt_keys() == {p.key for p in prompts(10) if p.text not in reasons}
    (cut,) = [s for s in store if s.key == Prompt.ask("chat", "q8").key]
    assert text(cut) == ["re: q8"], "a cut answer has no end"
    first = path.read_text()
    server.asked.clear()
    ask(server, prompts(10), path)
    assert set(server.asked) == set(reasons)
    assert path.read_text().startswith(first)
    assert store.prompt_keys() == {p.key for p in prompts(10)}
    assert not path.with_suffix(".errors.jsonl").exists()


def test_a_lost_server_keeps_what_it_had_answered(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with openai_server(lambda asked: len(CHAT.prompt_ids(asked["messages"]))) as server:

        def leave(done: int, total: int) -> None:
            if done == 10:
                server.server_close()  # running requests end, new ones are refused

        with pytest.raises(ServerLostError, match=r"1\d of 40 answers are kept") as caught:
            ask(server, prompts(40), path, retries=1, progress=leave)
        assert "run the same command again" in caught.value.fix
        kept = SampleStore(path).prompt_keys()
        assert 10 <= len(kept) < 20
    with openai_server(lambda asked: len(CHAT.prompt_ids(asked["messages"]))) as again:
        store = ask(again, prompts(40), path)
        assert len(again.requests) == 40 - len(kept)
    assert store.prompt_keys() == {p.key for p in prompts(40)}
    with pytest.raises(ServerLostError, match="0 of 1"):
        ask(again, prompts(1), tmp_path / "never.jsonl", retries=0)


@pytest.mark.parametrize("status", [401, 404])
def test_a_refusal_of_everything_ends_the_run_at_once(server: OpenAIServer, tmp_path: Path, status: int) -> None:
    server.faults = {f"q{i}": [status] for i in range(40)}
    with pytest.raises(DataError, match="refuses every request"):
        ask(server, prompts(40), tmp_path / "s.jsonl")
    assert len(server.requests) < 20


def test_another_tokenizer_than_the_servers_is_noticed(tmp_path: Path) -> None:
    with (
        openai_server(lambda asked: len(CHAT.prompt_ids(asked["messages"])) + 1) as server,
        pytest.raises(DataError, match="the server counts 7 tokens in a prompt, the local tokenizer 6"),
    ):
        ask(server, prompts(3), tmp_path / "s.jsonl")


def test_useless_answers_and_prompts_are_no_silent_empty_store(server: OpenAIServer, tmp_path: Path) -> None:
    server.faults = {f"q{i}": ["empty"] for i in range(3)}
    with pytest.raises(DataError, match=r"not one answer .* is usable: 3 skipped"):
        ask(server, prompts(3), tmp_path / "s.jsonl")
    with pytest.raises(DataError, match="not one of 3 prompts can be used: 3 skipped"):
        ask(server, prompts(3), tmp_path / "s.jsonl", max_prompt_tokens=5)


def test_several_turns_and_calls_of_tools(tmp_path: Path) -> None:
    chat = template(TOOLS, thinking=False)
    tool = {"type": "function", "function": {"name": "weather"}}
    function: dict[str, Any] = {"name": "weather", "arguments": '{"city": "oslo"}'}
    call = {"id": "1", "type": "function", "function": function}
    two = Prompt("chat", ({"role": "user", "content": "q1"}, {"role": "user", "content": "q2"}))
    calls = Prompt("tools", ({"role": "user", "content": "q3"},), (tool,))
    decoded = {
        "role": "assistant",
        "content": "",
        "tool_calls": [call | {"function": function | {"arguments": {"city": "oslo"}}}],
    }
    given = Prompt("tools", ({"role": "user", "content": "q4"}, decoded, {"role": "tool", "content": "cold"}), (tool,))

    def count(asked: dict[str, Any]) -> int:
        sent = [
            json.loads(json.dumps(m).replace('"{\\"city\\": \\"oslo\\"}"', '{"city": "oslo"}'))
            for m in asked["messages"]
        ]
        return len(chat.prompt_ids(sent, asked.get("tools", ())))

    with openai_server(count) as server:
        server.faults = {"q3": [{"content": None, "tool_calls": [call]}]}
        store = ask(server, [two, calls, given], tmp_path / "s.jsonl", chat)
        history = [[m["content"] for m in r["messages"]] for r in server.requests if "tools" not in r]
        assert history == [["q1"], ["q1", "re: q1", "q2"]]
        (sent,) = [r["messages"][1] for r in server.requests if len(r["messages"]) == 3 and "tools" in r]
        assert sent["tool_calls"][0]["function"]["arguments"] == '{"city": "oslo"}'
    spans = {s.key: text(s, chat) for s in store}
    # Thinking off: the template's empty thinking stands before the newest answer only, hence two samples.
    assert spans[two.key] == ["re: q1 <|im_end|>"]
    assert spans[two.key + ".1"] == ["re: q2 <|im_end|>"]
    assert spans[calls.key] == ["<tool_call> weather oslo </tool_call> <|im_end|>"]
    assert spans[given.key] == ["re: cold <|im_end|>"]
    assert store.prompt_keys() == {two.key, calls.key, given.key}


def test_reasoning_that_the_server_keeps_apart_is_part_of_the_answer(tmp_path: Path) -> None:
    chat = template(TOOLS, thinking=True)
    with openai_server(lambda asked: len(chat.prompt_ids(asked["messages"]))) as server:
        server.faults = {"q1": [{"content": "so long", "reasoning_content": "hm hm"}]}
        (sample,) = ask(server, [Prompt.ask("chat", "q1")], tmp_path / "s.jsonl", chat)
    assert text(sample, chat) == ["<think> hm hm </think> so long <|im_end|>"]
    assert sample.thinking is True
