"""`python -m dspark_serving.bench.client_process`: runs SGLang's load client again and again.

SGLang's client takes 9 seconds of CPU to import, which a sweep of hundreds of runs would pay hundreds of times, on the
cores that it measures. This process imports it once and forks for every run; a fork does exactly what
`python -m sglang.benchmark.serving ARGUMENTS` does.

Reads one JSON object a line, {"arguments": [...], "log": path, "seconds": limit}; answers {"code": exit code}.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

_MODULE = "sglang.benchmark.serving"  # by name: it runs here as a program, nothing of it is used as a library


def main() -> None:
    """Answer until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the import prints is no answer
    module = importlib.import_module(_MODULE)
    forks = multiprocessing.get_context("fork")
    for line in sys.stdin:
        order = json.loads(line)
        run = forks.Process(target=_run, args=(module, order["arguments"], order["log"], order["seconds"]))
        run.start()
        run.join()
        answers.write(json.dumps({"code": run.exitcode}) + "\n")


def _run(module: ModuleType, arguments: list[str], log: str, seconds: int) -> None:
    with Path(log).open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    signal.alarm(seconds)  # ends this fork, not the process that forked it
    sys.argv = [_MODULE, *arguments]
    module.cli_main()


if __name__ == "__main__":
    main()
