"""Answers through any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import openai
from openai.types.chat import ChatCompletion

from dspark_serving.errors import DataError
from dspark_training.data.answers import Progress
from dspark_training.data.chat import ChatTemplate, TemplateMismatchError, Turn
from dspark_training.data.conversation import Message, Prompt, RowError, parse_row
from dspark_training.data.dialogue import Dialogue, finish, open_dialogues
from dspark_training.data.skipped import Skipped
from dspark_training.data.store import SampleStore

_EVERY_REQUEST_FAILS = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)


class Server(NamedTuple):
    """An OpenAI-compatible server that runs the target."""

    url: str  # with /v1, as the server documents it
    model: str | None = None  # None: the first that the server names
    api_key: str = "none"  # local servers take any
    concurrency: int = 16
    retries: int = 5  # of a request, with exponential back-off
    timeout: float = 600.0  # seconds for one answer


class ServerLostError(DataError):
    """The server does not answer any more; what it had answered is kept."""


def answer_remotely(
    server: Server,
    template: ChatTemplate,
    prompts: Sequence[Prompt],
    store_path: str | Path,
    *,
    greedy_share: float,
    temperature: float,
    top_p: float = 1.0,
    max_new_tokens: int,
    max_prompt_tokens: int,
    seed: int,
    max_samples: int | None = None,
    progress: Progress = lambda done, total: None,
) -> SampleStore:
    """The same as `answers.answer`, by a server; a second call asks for what failed and what is missing.

    Requests that fail after all retries go to `<store>.errors.jsonl` with their reason. The server's text is
    tokenised with the target's own tokenizer, behind the prompt as its chat template renders it.

    Args:
        template: of the target's checkpoint; its `thinking` is sent along and noted in each sample.

    Raises:
        ServerLostError: the server cannot be reached any more.
        DataError: no request can succeed (wrong key or model), the server counts other tokens in a prompt than the
            local tokenizer does, the store holds another tokenizer's ids, or the disk is full.
    """
    store = SampleStore(store_path)
    dialogues = open_dialogues(
        template,
        prompts,
        store,
        Skipped(store.path.with_suffix(".skipped.jsonl")),
        greedy_share=greedy_share,
        temperature=temperature,
        max_prompt_tokens=max_prompt_tokens,
        seed=seed,
        max_samples=max_samples,
    )
    run = _Run(server, template, store, max_new_tokens, max_prompt_tokens, top_p, progress)
    asyncio.run(run.all(dialogues))
    return store


class _Run:
    """One call of `answer_remotely`."""

    def __init__(
        self,
        server: Server,
        template: ChatTemplate,
        store: SampleStore,
        max_new_tokens: int,
        max_prompt_tokens: int,
        top_p: float,
        progress: Progress,
    ) -> None:
        self.server, self.template, self.store = server, template, store
        self.max_new_tokens, self.max_prompt_tokens, self.top_p = max_new_tokens, max_prompt_tokens, top_p
        self.errors = Skipped(store.path.with_suffix(".errors.jsonl"))
        self.progress = progress
        self.done = len(store.prompt_keys())
        self.total = self.done
        self.model = server.model or ""

    async def all(self, dialogues: Sequence[Dialogue]) -> None:
        """Answer every dialogue; the first error that no other request can survive ends all of them."""
        self.total += len(dialogues)
        waiting = iter(dialogues)  # shared: each worker takes the next one
        server = self.server
        async with openai.AsyncOpenAI(
            base_url=server.url, api_key=server.api_key, max_retries=server.retries, timeout=server.timeout
        ) as self.client:
            await self._choose_model()
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(server.concurrency, len(dialogues))):
                        group.create_task(self._work(waiting))
            except* DataError as errors:
                raise errors.exceptions[0] from None
        if self.errors.counts and not self.done:
            raise DataError(
                f"not one answer by {server.url} is usable: {self.errors.summary()}",
                expected="answers",
                fix="Look into that file.",
            )

    async def _choose_model(self) -> None:
        """Ask for the models: this also tells a wrong address before anything is queued."""
        try:
            known = [model.id for model in (await self.client.models.list()).data or []]
        except _EVERY_REQUEST_FAILS as error:
            raise self._refused(error) from error
        except (openai.OpenAIError, json.JSONDecodeError, AttributeError) as error:
            raise self._lost(error) from error
        self.model = self.model or (known[0] if known else "default")

    async def _work(self, waiting: Any) -> None:
        for dialogue in waiting:
            try:
                while await self._next_answer(dialogue):
                    pass
            except (RowError, TemplateMismatchError) as error:
                self.errors.add(error.problem, dialogue.prompt.key, dialogue.prompt._asdict())
                continue
            except openai.OpenAIError as error:
                reason = await self._reason(error)
                self.errors.add(reason, dialogue.prompt.key, dialogue.prompt._asdict())
                continue
            finish(dialogue, self.store, self.errors, top_p=self.top_p, thinking=self.template.thinking)
            self.done += 1
            self.progress(self.done, self.total)

    async def _next_answer(self, dialogue: Dialogue) -> bool:
        """Ask for one answer; True if another one is wanted."""
        extra: dict[str, Any] = {}
        if self.template.thinking is not None:
            extra["chat_template_kwargs"] = {"enable_thinking": self.template.thinking}
        messages: Any = [_as_sent(m) for m in dialogue.messages]
        tools: Any = list(dialogue.prompt.tools) or openai.omit
        try:
            reply = await self.client.chat.completions.create(
                model=self.model,
                messages=messages,
                tools=tools,
                temperature=dialogue.temperature,
                top_p=self.top_p,
                max_tokens=self.max_new_tokens,
                extra_body=extra,
            )
        except json.JSONDecodeError:
            raise _MALFORMED from None
        answer, whole = _read(reply)
        self._compare_tokens(reply, dialogue)
        more = dialogue.add(self._turn(dialogue, answer, whole), answer, whole=whole)
        return more and len(dialogue.prompt_ids) <= self.max_prompt_tokens

    def _turn(self, dialogue: Dialogue, answer: Message, whole: bool) -> Turn:
        rendered = self.template.turn(dialogue.messages, dialogue.prompt.tools, answer)
        # A cut answer has no end: what the template puts there is not the target's.
        words, end = rendered.answer_ids[:-1], rendered.answer_ids[-1:] if whole else []
        if not answer.get("tool_calls") and not answer.get("reasoning_content"):
            words = self.template.continuation_ids(answer["content"])  # templates may trim; the target did not
        return Turn(dialogue.prompt_ids, words + end)

    def _compare_tokens(self, reply: ChatCompletion, dialogue: Dialogue) -> None:
        counted = reply.usage.prompt_tokens if reply.usage else 0
        if counted and counted != len(dialogue.prompt_ids):
            raise DataError(
                f"the server counts {counted} tokens in a prompt, the local tokenizer {len(dialogue.prompt_ids)}",
                expected="the same tokenizer and chat template on both sides",
                fix="Pass the --target that the server runs, and the same --thinking as it uses by default.",
            )

    async def _reason(self, error: openai.OpenAIError) -> str:
        """Why a request failed.

        Raises:
            DataError: no other request would fare better.
        """
        if isinstance(error, _EVERY_REQUEST_FAILS):
            raise self._refused(error) from error
        if isinstance(error, openai.APIConnectionError):
            try:
                await self.client.models.list()
            except openai.OpenAIError:
                raise self._lost(error) from error
        if isinstance(error, openai.APIStatusError):
            return f"the server answered {error.status_code}"
        return "the server hung up" if isinstance(error, openai.APIConnectionError) else _MALFORMED.problem

    def _refused(self, error: Exception) -> DataError:
        return DataError(
            f"{self.server.url} refuses every request ({error})",
            expected="access to the model",
            fix="Check --server, --model and OPENAI_API_KEY.",
        )

    def _lost(self, error: Exception) -> ServerLostError:
        return ServerLostError(
            f"{self.server.url} does not answer ({error})",
            expected="an OpenAI-compatible server",
            fix=f"Start it and run the same command again: {self.done} of {self.total} answers are kept in "
            f"{self.store.path}.",
        )


_MALFORMED = RowError("a malformed reply", expected="an OpenAI chat completion")


def _read(reply: object) -> tuple[Message, bool]:
    """The answer and whether it ended by itself.

    Raises:
        RowError: the reply is no chat completion, or is empty.
    """
    if not isinstance(reply, ChatCompletion) or not isinstance(reply.choices, list) or not reply.choices:
        raise _MALFORMED
    choice = reply.choices[0]
    said = getattr(choice, "message", None)
    if said is None or not (said.content is None or isinstance(said.content, str)):
        raise _MALFORMED
    answer: Message = {"role": "assistant", "content": said.content or ""}
    reasoning = getattr(said, "reasoning_content", None)
    if isinstance(reasoning, str) and reasoning:
        answer["reasoning_content"] = reasoning
    if said.tool_calls:
        calls = [{"id": c.id, "type": "function", "function": c.function.model_dump()} for c in said.tool_calls]
        answer = parse_row({"messages": [answer | {"tool_calls": calls}]}).messages[0]
    whole = choice.finish_reason in ("stop", "tool_calls")
    if reasoning and not whole and not answer["content"]:
        raise RowError("cut while it was thinking")
    if not (answer["content"] or answer.get("tool_calls") or reasoning):
        raise RowError("empty answer")
    return answer, whole


def _as_sent(message: Message) -> Message:
    """Tool calls with their arguments as JSON text, which is what the protocol asks for."""
    if not message.get("tool_calls"):
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}
