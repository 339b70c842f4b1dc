"""A server on the loopback with the two OpenAI routes that `dspark data answers --server` uses; it can misbehave."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Count = Callable[[dict[str, Any]], int]  # request -> its prompt's tokens


class OpenAIServer(ThreadingHTTPServer):
    """Answers `re: <last message>`.

    Attributes:
        faults: words of a prompt -> faults of its first requests: a status, `hang up`, `no json`, `no choices`,
            `empty`, `length`, or a whole message (dict).
    """

    daemon_threads = True

    def __init__(self, count: Count) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.count = count
        self.faults: dict[str, list[Any]] = {}
        self.requests: list[dict[str, Any]] = []
        self.asked: Counter[str] = Counter()
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away are part of the tests."""


@contextmanager
def openai_server(count: Count) -> Iterator[OpenAIServer]:
    server = OpenAIServer(count)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: OpenAIServer

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "us"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        text = asked["messages"][-1]["content"]
        with server.lock:
            server.requests.append(asked)
            server.asked[text] += 1
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            faults = server.faults.get(text, [])
            fault = faults.pop(0) if faults else None
        threading.Event().wait(0.02)  # so that requests meet
        with server.lock:
            server.running -= 1
        if fault == "hang up":
            self.connection.close()
        elif isinstance(fault, int):
            self._send({"error": {"message": "no"}}, fault)
        elif fault == "no json":
            self._send(None)
        else:
            self._send(self._reply(asked, text, fault))

    def _reply(self, asked: dict[str, Any], text: str, fault: Any) -> dict[str, Any]:
        said = fault if isinstance(fault, dict) else {"content": "" if fault == "empty" else f"re: {text}"}
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant"} | said}
        choice["finish_reason"] = "length" if fault == "length" else "stop"
        tokens = self.server.count(asked)
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": asked["model"],
            "choices": None if fault == "no choices" else [choice],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1},
        }

    def _send(self, body: Any, status: int = 200) -> None:
        data = b"<html>" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""
