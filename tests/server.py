"""Real SGLang servers for tests: token-level requests and refusals, on top of the package's own launcher."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from dspark_serving.server import running_server

START_SECONDS = 300.0


class Server(NamedTuple):
    """A server that answers requests."""

    base_url: str
    log: Path

    def generate(self, prompt: str | list[int], **sampling: Any) -> dict[str, Any]:
        """Answer of /generate for a text or token ids; greedy unless `sampling` says otherwise."""
        key = "text" if isinstance(prompt, str) else "input_ids"
        body = {key: prompt, "sampling_params": {"temperature": 0.0, "max_new_tokens": 32, **sampling}}
        answer = httpx.post(f"{self.base_url}/generate", json=body, timeout=120.0, trust_env=False)
        answer.raise_for_status()
        return dict(answer.json())

    def report(self) -> dict[str, Any]:
        """What the plugin shows in /server_info."""
        info = httpx.get(f"{self.base_url}/server_info", timeout=30.0, trust_env=False).json()
        return dict(info["internal_states"][0]["dspark"])


def dspark(drafter: Path | str) -> list[str]:
    """The arguments that turn speculation with a drafter on."""
    return ["--speculative-algorithm", "dspark", "--speculative-draft-model-path", str(drafter)]


@contextmanager
def serve(model: Path, *arguments: str, log: Path, drafter: Path | None = None) -> Iterator[Server]:
    """Run a server on a free port, with DSPARK when a drafter is given, and yield it once it is healthy."""
    options = [*arguments, *(dspark(drafter) if drafter is not None else [])]
    with running_server(model, options, log=log, ready_seconds=START_SECONDS) as running:
        yield Server(running.url, running.log)


def run_to_exit(model: Path, *arguments: str) -> tuple[int, str]:
    """Run a server that is expected to refuse; returns its exit status and its standard error."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    return done.returncode, done.stderr
