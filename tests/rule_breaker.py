"""A plugin of SGLang, for tests: breaks the rule of speculative sampling while a file says so, as a negative control.

Text that was accepted by a wrong rule looks like any other; only its distribution tells.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FILE_VARIABLE = "RULE_BREAKER_FILE"
ACCEPTS_ALL = "accepts all that is possible"
NO_RESIDUAL = "draws from the target after a rejection"


def install() -> None:
    """Entry point: wrap our rejection rule, which the hook on SGLang's looks up by name."""
    from dspark_serving.sglang_adapter.cpu import sampling

    rule, draw_final = sampling.chain_speculative_sampling, sampling._draw_final

    def chain_speculative_sampling(**kwargs: Any) -> None:
        if _broken() == ACCEPTS_ALL:
            kwargs["uniform_samples"] = torch.zeros_like(kwargs["uniform_samples"])
        rule(**kwargs)

    def draw(target_probs: Any, draft_probs: Any, counts: Any, uniform: Any) -> torch.Tensor:
        if _broken() == NO_RESIDUAL:
            draft_probs = torch.zeros_like(draft_probs)
        return draw_final(target_probs, draft_probs, counts, uniform)

    vars(sampling).update(chain_speculative_sampling=chain_speculative_sampling, _draw_final=draw)


def environment(directory: Path) -> dict[str, str]:
    """Environment of a server that loads this plugin beside ours; `directory` gets its metadata and the file."""
    metadata = directory / "rule_breaker-0.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rule-breaker\nVersion: 0.0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\nrule_breaker = rule_breaker:install\n")
    path = os.pathsep.join([str(directory), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    break_rule(directory, "")
    return {"PYTHONPATH": path, FILE_VARIABLE: str(directory / "rule")}


def break_rule(directory: Path, how: str) -> None:
    """From the next round on; nothing restores the rule."""
    (directory / "rule").write_text(how)


def _broken() -> str:
    return Path(os.environ[FILE_VARIABLE]).read_text()
