"""Real SGLang servers for tests: token-level requests and refusals, on top of the package's own launcher.

Each has a cache of its own beside its log, so that no server sees what another one measured.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from dspark_serving.recording import read_recording
from dspark_serving.recording.file import Recording
from dspark_serving.server import running_server

START_SECONDS = 600.0


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

    def use(self, policy: str, **more: float) -> None:
        """Switch the policy."""
        self._post("policy", {"policy": policy, **more})

    def record(self, directory: Path) -> Recording:
        """The newest rounds, of a server that was started with `--dspark-recording directory`."""
        before = set(directory.glob("*.npz"))
        self._post("recording")
        deadline = time.monotonic() + 60.0
        while not (written := set(directory.glob("*.npz")) - before):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no recording appeared in {directory}; see {self.log}")
            time.sleep(0.05)
        return read_recording(written.pop())

    def _post(self, route: str, body: dict[str, Any] | None = None) -> None:
        url = f"{self.base_url}/dspark/{route}"
        httpx.post(url, json=body, timeout=60.0, trust_env=False).raise_for_status()


def speculation(drafter: Path | str, algorithm: str = "dspark") -> list[str]:
    """The arguments that turn speculation with a drafter on."""
    return ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(drafter)]


@contextmanager
def serve(
    model: Path, *arguments: str, log: Path, drafter: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a server on a free port, and yield it once it is healthy.

    Args:
        drafter: one of DSPARK; None without, or with `speculation` among the arguments.
        environment: variables of this server alone.
    """
    options = [*arguments, *(speculation(drafter) if drafter is not None else [])]
    with ExitStack() as running:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"DSPARK_CACHE": str(log.parent / "cache"), **(environment or {})}.items():
                patch.setenv(name, value)
            ours = running.enter_context(running_server(model, options, log=log, ready_seconds=START_SECONDS))
        yield Server(ours.url, ours.log)


def run_to_exit(model: Path, *arguments: str) -> tuple[int, str]:
    """Run a server that is expected to refuse; returns its exit status and its standard error."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    return done.returncode, done.stderr
