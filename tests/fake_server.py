"""A server in a thread that streams like SGLang's chat route, with the plugin's routes; what it says is made up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DRAFTED = 2.0  # accepted length of every policy but off
POLICIES = ("off", "full", "slow")


class FakeServer(ThreadingHTTPServer):
    """Remembers what it was asked; its policy sets its speed."""

    daemon_threads = True

    def __init__(self, model: str, *, plugin: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.plugin = plugin
        self.policy = "off"
        self.requests: list[dict[str, Any]] = []
        self.log: list[str] = []  # routes, in the order of the calls
        self.request_rounds = 0
        self.tokens = 0
        self.refuse: str | None = None  # a prompt
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def info(self) -> dict[str, Any]:
        state: dict[str, Any] = {"avg_spec_accept_length": 1.5}
        if self.plugin:
            state["dspark"] = {
                "policy": self.policy,
                "rounds": self.request_rounds,
                "request_rounds": self.request_rounds,
                "output_tokens": self.tokens,
                "verified_tokens": 6 * self.request_rounds,
                "phase_seconds_total": {"verify": 0.25 * self.request_rounds},
            }
        return {"speculative_num_draft_tokens": 6, "internal_states": [state]}


@contextmanager
def fake_server(model: str = "a model", *, plugin: bool = True) -> Iterator[FakeServer]:
    server = FakeServer(model, plugin=plugin)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        routes: dict[str, Any] = {
            "/v1/models": {"data": [{"id": self.server.model}]},
            "/model_info": {"tokenizer_path": self.server.model},
            "/server_info": self.server.info(),
        }
        self._answer(routes[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        self.server.log.append(self.path)
        if self.path == "/dspark/policy":
            if body["policy"] not in POLICIES:
                self._answer({"error": f"there is no policy {body['policy']}"}, 400)
                return
            self.server.policy = body["policy"]
            self._answer({})
        elif self.path == "/flush_cache":
            self._answer({})
        else:
            self._chat(body)

    def _chat(self, body: dict[str, Any]) -> None:
        server = self.server
        with server.lock:
            server.requests.append(body | {"policy_then": server.policy})
        if server.refuse == body["messages"][0]["content"]:
            self._answer({"error": "out of memory"}, 500)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        a_round = 1 if server.policy == "off" else int(DRAFTED)
        left = body["max_completion_tokens"]
        while left > 0:
            time.sleep(0.03 if server.policy == "slow" else 0.005)
            piece = "x" * min(a_round, left)
            left -= len(piece)
            self._send({"choices": [{"index": 0, "delta": {"content": piece}}]})
        with server.lock:
            rounds = (body["max_completion_tokens"] - 1) // a_round
            server.request_rounds += rounds
            server.tokens += rounds * a_round
        self._send({"choices": [], "usage": {"completion_tokens": body["max_completion_tokens"], "prompt_tokens": 3}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
