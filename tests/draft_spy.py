"""A plugin of SGLang, for tests: writes down the drafts of every round as they go into the target's verification.

Black boxes show accepted tokens only; a drafter that is served wrongly still gives the right text, just slower.
It can also have the server draft in some rounds only, by the length of the longest context.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

FILE_VARIABLE = "DRAFT_SPY_FILE"
SPARSE_VARIABLE = "DRAFT_SPY_SPARSE"
"""If set, the server drafts where `drafts_at` says so, instead of what the policy says."""


def install() -> None:
    """Entry point: hook the verification, of ragged and of whole blocks."""
    executor = "sglang.srt.speculative.dspark_components.dspark_verify.TargetVerifyExecutor"
    HookRegistry.register(f"{executor}.run_compact", _write, HookType.BEFORE)
    HookRegistry.register(f"{executor}.run_non_compact", _write_whole, HookType.BEFORE)
    if SPARSE_VARIABLE in os.environ:
        HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.__init__", _draft_sparsely, HookType.AFTER)


def environment(directory: Path) -> dict[str, str]:
    """Environment of a server that loads this plugin beside ours; `directory` gets its metadata and the drafts."""
    metadata = directory / "draft_spy-0.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: draft-spy\nVersion: 0.0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\ndraft_spy = draft_spy:install\n")
    path = os.pathsep.join([str(directory), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, FILE_VARIABLE: str(directory / "drafts.jsonl")}


def drafts_at(context: int) -> bool:
    """Whether a sparse server drafts: after plain rounds, and several times in a row."""
    return context % 7 < 3


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


def _draft_sparsely(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    from dspark_serving.scheduler.baselines import FullPolicy, OffPolicy
    from dspark_serving.scheduler.round import Batch, Plan

    class Sparse(FullPolicy):
        def plan(self, batch: Batch) -> Plan:
            return super().plan(batch) if drafts_at(int(batch.context_R.max())) else OffPolicy().plan(batch)

    worker = scheduler.draft_worker
    worker.use(Sparse())
    worker.use = lambda policy: None  # whoever comes later with another policy
