"""Result files: figures with all that is needed to measure them again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dspark_serving import __version__

Row = dict[str, Any]
"""One measured point or one summary; the keys are listed in benchmarks/README.md."""

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ResultFile:
    """A result file; made before anything is measured, it takes the time and the commit then."""

    name: str
    path: Path
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    _git: str = field(default_factory=lambda: git_commit())
    _start: float = field(default_factory=time.perf_counter)

    def write(self, rows: list[Row], notes: str) -> None:
        """Replace the file, whole or not at all."""
        content = {
            "name": self.name,
            "created": self.created.isoformat(timespec="seconds"),
            "command": command(),
            "git": self._git,
            "seconds": round(time.perf_counter() - self._start, 1),
            "environment": environment(),
            "rows": rows,
            "notes": notes,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, self.path)


def command() -> str:
    """The command line of this process, as `python -m` shows modules of this repository."""
    program, *arguments = sys.argv
    module = Path(program).resolve()
    inside = module.is_relative_to(_ROOT) and module.suffix == ".py"
    start = ["python", "-m", ".".join(module.relative_to(_ROOT).with_suffix("").parts)] if inside else [module.name]
    return shlex.join([*start, *arguments])


def git_commit() -> str:
    """The commit of this repository, with `-dirty` behind it when files differ; "unknown" outside a clone."""
    describe = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    done = subprocess.run(describe, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def environment() -> dict[str, Any]:
    """Machine and versions."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sglang": importlib.metadata.version("sglang"),
        "plugin": __version__,
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
