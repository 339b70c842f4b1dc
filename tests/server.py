"""Launches a real SGLang server for a test and always takes it down again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

START_SECONDS = 180.0


@dataclass(frozen=True)
class Server:
    """A server that answers requests."""

    base_url: str
    log: Path

    def generate(self, prompt: str | list[int], **sampling: Any) -> dict[str, Any]:
        """Answer of /generate for a text or token ids; greedy unless `sampling` says otherwise."""
        key = "text" if isinstance(prompt, str) else "input_ids"
        body = {key: prompt, "sampling_params": {"temperature": 0.0, "max_new_tokens": 32, **sampling}}
        answer = httpx.post(f"{self.base_url}/generate", json=body, timeout=120.0)
        answer.raise_for_status()
        return dict(answer.json())

    def report(self) -> dict[str, Any]:
        """What the plugin shows in /server_info."""
        info = httpx.get(f"{self.base_url}/server_info", timeout=30.0).json()
        return dict(info["internal_states"][0]["dspark"])


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(model: Path | str, *arguments: str, port: int) -> list[str]:
    """The command line of a server."""
    return [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port), *arguments]


@contextmanager
def serve(
    model: Path | str,
    *arguments: str,
    log: Path,
    drafter: Path | str | None = None,
    env: dict[str, str] | None = None,
    start_seconds: float = START_SECONDS,
) -> Iterator[Server]:
    """Run a server on a free port, with DSPARK when a drafter is given, and yield it once it is healthy.

    Raises:
        RuntimeError: it exited or was not healthy in time; carries the end of its log.
    """
    if drafter is not None:
        arguments = ("--speculative-algorithm", "dspark", "--speculative-draft-model-path", str(drafter), *arguments)
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            command(model, *arguments, port=port), stdout=output, stderr=subprocess.STDOUT, env=os.environ | (env or {})
        )
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}", process, log, start_seconds)
            yield Server(f"http://127.0.0.1:{port}", log)
        finally:
            _stop(process)


def run_to_exit(
    model: Path | str, arguments: Sequence[str], *, port: int | None = None, env: dict[str, str] | None = None
) -> tuple[int, str]:
    """Run a server that is expected to refuse; returns its exit status and its standard error."""
    done = subprocess.run(
        command(model, *arguments, port=port or free_port()),
        capture_output=True, text=True, timeout=START_SECONDS, env=os.environ | (env or {}), check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def _wait_until_healthy(base_url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{base_url}/health", timeout=10.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    state = f"exited with {process.returncode}" if process.poll() is not None else f"not healthy after {seconds:.0f} s"
    raise RuntimeError(f"server {state}; end of its log:\n" + "\n".join(log.read_text().splitlines()[-40:]))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started, and nothing else."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=10.0)
    for member in alive:
        member.kill()
    psutil.wait_procs(alive, timeout=10.0)
    process.wait(timeout=10.0)
