"""Conversations: the layouts in which datasets hold them, and which turns the target has to answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dspark_serving.errors import DataError

Message = dict[str, Any]  # as chat templates take them: role, content, perhaps tool_calls (arguments decoded)

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "developer": "system",
}
_KNOWN = {"system", "user", "assistant", "tool"}


class RowError(DataError):
    """One row cannot be used; `problem` is the reason, the same for all rows with the same fault."""

    def __init__(
        self, reason: str, expected: str = '"prompt", "turns", OpenAI "messages" or ShareGPT "conversations" with text'
    ) -> None:
        super().__init__(reason, expected=expected, fix="Correct or delete that row.")

    def at(self, where: str) -> DataError:
        """The same as an error that names the row."""
        return DataError(f"{where}: {self.problem}", expected=self.expected, fix=self.fix)


class Conversation(NamedTuple):
    """Messages as a dataset holds them, answers included."""

    domain: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """Identity: the same messages and tools in the same domain are the same conversation."""
        return _key(self)


class Prompt(NamedTuple):
    """A conversation with its answers left out, for the target to fill in."""

    domain: str  # math, code, chat, ...
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    @classmethod
    def ask(cls, domain: str, text: str) -> Prompt:
        """One user message."""
        return cls(domain, ({"role": "user", "content": text},))

    @classmethod
    def of(cls, conversation: Conversation) -> Prompt:
        """Leave out what the target shall write: every assistant message but calls of tools, whose results follow.

        Raises:
            RowError: no user message is left.
        """
        kept = [m for m in conversation.messages if m["role"] != "assistant" or m.get("tool_calls")]
        while kept and kept[-1]["role"] in ("assistant", "system"):  # nothing follows: the target decides itself
            kept.pop()
        if not any(m["role"] == "user" for m in kept):
            raise RowError("no user message")
        return cls(conversation.domain, tuple(kept), conversation.tools)

    @property
    def text(self) -> str:
        """The last user message."""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")

    def with_suffix(self, suffix: str) -> Prompt:
        """The same with `suffix` behind the last user message."""
        messages = list(self.messages)
        last = max(i for i, m in enumerate(messages) if m["role"] == "user")
        messages[last] = messages[last] | {"content": messages[last]["content"] + suffix}
        return self._replace(messages=tuple(messages))

    @property
    def key(self) -> str:
        """Identity: the same messages and tools in the same domain are the same prompt."""
        return _key(self)

    def openings(self) -> Iterator[int]:
        """Numbers of messages before which the target answers: where a user or a tool spoke and none replies."""
        for i, message in enumerate(self.messages, start=1):
            follows = self.messages[i]["role"] if i < len(self.messages) else None
            if message["role"] in ("user", "tool") and follows not in ("assistant", "tool"):
                yield i


def _key(said: Conversation | Prompt) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def parse_row(row: object) -> Conversation:
    """Read a row of any supported layout.

    {"prompt": text}, {"turns": [user text, ...]}, {"messages": [{role, content, tool_calls}, ...]} or
    {"conversations": [{from, value}, ...]}, each with an optional "domain" (else "source", as in Open-PerfectBlend),
    "system" text and "tools" (a list, or JSON of one).

    Raises:
        RowError: with the reason.
    """
    if not isinstance(row, Mapping):
        raise RowError("not a JSON object")
    if isinstance(row.get("prompt"), str):
        raw: object = [{"role": "user", "content": row["prompt"]}]
    elif isinstance(row.get("turns"), list):
        raw = [{"role": "user", "content": turn} for turn in row["turns"]]
    else:
        raw = row.get("messages") or row.get("conversations")
        if raw is None:
            known = [name for name in ("messages", "conversations") if name in row]
            raise RowError("empty conversation" if known else "no prompt, turns, messages or conversations")
    if not isinstance(raw, list):
        raise RowError("messages that are no list")
    messages = [_message(m) for m in raw]
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
    if not messages:
        raise RowError("empty conversation")
    domain = row.get("domain") or row.get("source") or "chat"
    conversation = Conversation(str(domain), tuple(messages), _tools(row.get("tools")))
    _require_unicode(conversation)
    return conversation


def _require_unicode(said: Conversation) -> None:
    """Half a surrogate pair, which JSON can hold, is a text that no tokenizer takes."""
    try:
        json.dumps(said, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RowError("text that is no Unicode") from None


def _message(raw: object) -> Message:
    if not isinstance(raw, Mapping):
        raise RowError("a message that is no object")
    name = raw.get("role") or raw.get("from")
    if name == "function_call":  # ShareGPT: the value is the call, or a list of them
        calls = _decoded(raw.get("value"))
        return {"role": "assistant", "content": "", "tool_calls": _calls(calls if isinstance(calls, list) else [calls])}
    role = _ROLES.get(str(name), name)
    if role not in _KNOWN:
        raise RowError(f"unknown role {name!r}")
    message: Message = {"role": role, "content": _text(raw.get("content", raw.get("value")))}
    if raw.get("tool_calls"):
        message["tool_calls"] = _calls(raw["tool_calls"])
    elif not message["content"].strip() and role != "tool":
        raise RowError(f"empty {role} message")
    # Arrow gives every message the fields of all of them, empty where a message had none.
    extra = ("name", "tool_call_id", "reasoning_content")
    return message | {field: raw[field] for field in extra if isinstance(raw.get(field), str)}


def _text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise RowError("content that is not text")


def _calls(raw: object) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object, which is what chat templates expect."""
    if not isinstance(raw, list):
        raise RowError("a malformed tool call")
    calls = []
    for call in raw:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("a malformed tool call")
        arguments = function.get("arguments")
        decoded = {"name": function["name"], "arguments": {} if arguments is None else _decoded(arguments)}
        known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append(known | {"type": "function", "function": decoded})
    return calls


def _tools(raw: object) -> tuple[dict[str, Any], ...]:
    tools = _decoded(raw) if raw else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("malformed tools")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise RowError("JSON in a string that does not parse") from None
