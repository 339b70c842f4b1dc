"""An SGLang server as a child process: launched on a loopback port, waited for, asked, and ended whatever happens."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx

from dspark_serving.errors import EnvironmentMismatchError

_HOST = "127.0.0.1"
_END_SECONDS = 20.0
_POLL_SECONDS = 0.5
# Two OpenMP threads that spin while they wait stop each other on a busy machine.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


class Answer(NamedTuple):
    """One chat completion at temperature 0."""

    text: str
    output_tokens: int
    seconds: float  # from request to full answer, prefill included
    rounds: int | None  # target forwards after prefill; None without speculation

    @property
    def accepted_length(self) -> float | None:
        """Tokens a round, bonus token included; the first token is the prefill's and counts for no round."""
        return None if self.rounds is None else (self.output_tokens - 1) / max(self.rounds, 1)


class Server(NamedTuple):
    """A server that answers."""

    url: str
    log: Path

    def chat(self, prompt: str, *, max_tokens: int, timeout_seconds: float = 300.0) -> Answer:
        """Ask through the OpenAI-compatible route, greedily.

        Raises:
            EnvironmentMismatchError: the server refuses, dies or takes longer than the timeout.
        """
        request = {
            "model": "default",
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "return_spec_tokens_details": True,
        }
        start = time.perf_counter()
        try:
            url = f"{self.url}/v1/chat/completions"
            response = httpx.post(url, json=request, timeout=timeout_seconds, trust_env=False).raise_for_status()
        except httpx.HTTPError as error:
            raise EnvironmentMismatchError(
                f"the server did not answer ({error})", expected="a chat completion", fix=f"Its log is {self.log}."
            ) from error
        seconds = time.perf_counter() - start
        body = response.json()
        details = (body.get("sglext") or {}).get("spec_tokens_details")
        return Answer(
            text=body["choices"][0]["message"]["content"],
            output_tokens=body["usage"]["completion_tokens"],
            seconds=seconds,
            rounds=details["spec_verify_ct"] if details else None,
        )


@contextmanager
def running_server(
    model: Path, options: Sequence[str] = (), *, log: Path, ready_seconds: float = 600.0
) -> Iterator[Server]:
    """Launch `python -m sglang.launch_server`, yield it when it is ready, end it with all its processes on leaving.

    Args:
        model: checkpoint directory of the target.
        options: further command-line options of SGLang.
        log: file that gets the server's output; replaced.
        ready_seconds: bound of the wait for /health.

    Raises:
        EnvironmentMismatchError: the server ends or is not ready in time.
    """
    port = _free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--host", _HOST, "--port", str(port), *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        # A session of its own: the schedulers are in its process group, so that none is left behind.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | _ENVIRONMENT, start_new_session=True
        )
    try:
        server = Server(f"http://{_HOST}:{port}", log)
        _wait_until_ready(process, server, ready_seconds)
        yield server
    finally:
        _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], server: Server, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise EnvironmentMismatchError(
                f"the server ended with code {process.returncode} before it was ready: {last_complaint(server.log)}",
                expected="it to serve",
                fix=f"Its log is {server.log}.",
            )
        with suppress(httpx.TransportError):  # nobody listens yet
            if httpx.get(f"{server.url}/health", timeout=10.0, trust_env=False).status_code == httpx.codes.OK:
                return
        time.sleep(_POLL_SECONDS)
    raise EnvironmentMismatchError(
        f"the server is not ready after {seconds:.0f} s", expected="less", fix=f"Its log is {server.log}."
    )


def last_complaint(log: Path) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"dspark: error|[\w.]*(Error|Exception)\b", line)]
    return (named or lines or ["its log is empty"])[-1]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    with suppress(ProcessLookupError):  # the usual case: nobody of the group is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
