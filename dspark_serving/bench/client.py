"""SGLang's load client (`sglang.benchmark.serving`) and what it measured of every request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, NamedTuple, Self

from dspark_serving.errors import EnvironmentMismatchError
from dspark_serving.server import last_complaint

_RUN_SECONDS = 3600
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}


class Sample(NamedTuple):
    """One streamed answer; seconds."""

    text: str
    output_tokens: int
    ttft: float
    gaps: tuple[float, ...]  # between the pieces of text, each of one or more tokens

    @property
    def latency(self) -> float:
        """From the request to the last piece."""
        return self.ttft + sum(self.gaps)

    @property
    def tpot(self) -> float:
        """Mean time of a token after the first."""
        return sum(self.gaps) / max(self.output_tokens - 1, 1)


class Answers(NamedTuple):
    """What one run of the client brought."""

    seconds: float  # from the first request to the last answer
    samples: tuple[Sample, ...]  # in the order of the requests


class LoadClient:
    """The client process; a context manager that ends it and whatever it runs."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def __enter__(self) -> Self:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = TemporaryDirectory(prefix="dspark-bench-")
        command = [sys.executable, "-m", "dspark_serving.bench.client_process"]
        with self._log.open("w") as log:
            # A session of its own: Ctrl-C ends the sweep, which then ends the client.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | _ENVIRONMENT,
                start_new_session=True,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(ProcessLookupError):  # it died by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._scratch.cleanup()

    @property
    def scratch(self) -> Path:
        """A directory that lives as long as the client."""
        return Path(self._scratch.name)

    def run(self, arguments: list[str]) -> Answers:
        """Run `sglang.benchmark.serving` with `arguments`, and read what it wrote.

        Raises:
            EnvironmentMismatchError: it fails, takes longer than an hour, or a request failed.
        """
        output = self.scratch / "answers.jsonl"
        output.unlink(missing_ok=True)
        details = ["--output-file", str(output), "--output-details", "--disable-tqdm", "--warmup-requests", "0"]
        code = self._ask([*arguments, *details])
        if code != 0 or not output.exists():
            raise EnvironmentMismatchError(
                f"sglang.benchmark.serving ended with code {code}: {last_complaint(self._log)}",
                expected="0",
                fix=f"Its log is {self._log}.",
            )
        return read_answers(json.loads(output.read_text().splitlines()[-1]))

    def _ask(self, arguments: list[str]) -> int | None:
        """The exit code of a run; None when the process that should make it is gone."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None or self._process.poll() is not None:
            return None
        order = {"arguments": arguments, "log": str(self._log), "seconds": _RUN_SECONDS}
        with suppress(BrokenPipeError):  # it is dying: then no answer comes
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
        answer = stdout.readline()
        return int(json.loads(answer)["code"]) if answer else None


def read_answers(result: dict[str, Any]) -> Answers:
    """The requests of one line of the client's output (with --output-details).

    Raises:
        EnvironmentMismatchError: a request failed (its error is named) or was answered without text.
    """
    columns = [result[name] for name in ("generated_texts", "output_lens", "ttfts", "itls", "errors")]
    rows = list(zip(*columns, strict=True))
    failures = [error for *_, error in rows if error]
    if failures or not rows:
        said = failures[0].strip().splitlines()[-1] if failures else "none was sent"
        raise EnvironmentMismatchError(
            f"{len(failures)} of {len(rows)} requests failed: {said}",
            expected="all to be answered",
            fix="See the server's log.",
        )
    if not all(ttft > 0 for _, _, ttft, *_ in rows):
        raise EnvironmentMismatchError(
            "an answer has no text, so the client measured no time for it",
            expected="text in every answer",
            fix="Let answers go on after the end-of-text token, or use other prompts.",
        )
    samples = tuple(Sample(text, tokens, ttft, tuple(gaps)) for text, tokens, ttft, gaps, _ in rows)
    return Answers(float(result["duration"]), samples)
