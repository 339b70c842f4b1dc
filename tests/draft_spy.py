"""A plugin of SGLang, for tests: writes down the drafts of every round as they go into the target's verification.

Black boxes show accepted tokens only; a drafter that is served wrongly still gives the right text, just slower.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

FILE_VARIABLE = "DRAFT_SPY_FILE"


def install() -> None:
    """Entry point: hook the verification, of ragged and of whole blocks."""
    executor = "sglang.srt.speculative.dspark_components.dspark_verify.TargetVerifyExecutor"
    HookRegistry.register(f"{executor}.run_compact", _write, HookType.BEFORE)
    HookRegistry.register(f"{executor}.run_non_compact", _write_whole, HookType.BEFORE)


def environment(directory: Path) -> dict[str, str]:
    """Environment of a server that loads this plugin beside ours; `directory` gets its metadata and the drafts."""
    metadata = directory / "draft_spy-0.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: draft-spy\nVersion: 0.0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\ndraft_spy = draft_spy:install\n")
    path = os.pathsep.join([str(directory), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, FILE_VARIABLE: str(directory / "drafts.jsonl")}


def drafts_by_request(directory: Path) -> dict[str, list[list[int]]]:
    """The blocks drafted so far for each request, in the order of its rounds."""
    drafts = defaultdict(list)
    for line in (directory / "drafts.jsonl").read_text().splitlines():
        drafted = json.loads(line)
        drafts[drafted["request"]].append(drafted["tokens"])
    return drafts


def _write(executor: Any, *, batch: Any, draft_tokens: Any, **unused: Any) -> None:
    with Path(os.environ[FILE_VARIABLE]).open("a") as file:
        for request, tokens in zip(batch.reqs, draft_tokens.tolist(), strict=True):
            file.write(json.dumps({"request": request.rid, "tokens": tokens}) + "\n")


def _write_whole(executor: Any, *, batch: Any, verify_ids_2d: Any, **unused: Any) -> None:
    _write(executor, batch=batch, draft_tokens=verify_ids_2d[:, 1:])
