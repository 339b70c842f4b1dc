"""Under tensor parallelism one rank decides: two processes, of which one would decide otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from dspark_serving.scheduler.round import Plan
from dspark_serving.sglang_adapter.plan_sync import PlanSync

DECIDED = Plan(True, 0.125, 1234, "price", 7.5, 0.25)


def _rank(rank: int, store: str, output: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    sync = PlanSync(dist.new_group([0, 1]), source=0)
    own = DECIDED if sync.decides else None
    plans = [sync.share(own) for _ in range(3)]
    flags = [sync.agree(rank == 0), sync.agree(rank == 1)]
    found = [sync.unanimous(True), sync.unanimous(rank == 0), sync.unanimous(False)]
    Path(output, f"{rank}.json").write_text(json.dumps([plans, flags, found]))
    dist.destroy_process_group()


def test_every_rank_follows_the_first(tmp_path: Path) -> None:
    spawn(_rank, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        plans, flags, found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [Plan(*plan) for plan in plans] == [DECIDED] * 3
        assert flags == [True, False]  # what rank 0 said, both times
        assert found == [True, False, False]


def test_one_rank_asks_nobody() -> None:
    sync = PlanSync(None)
    assert sync.decides
    assert sync.share(DECIDED) is DECIDED
    assert sync.agree(True)
    assert sync.unanimous(True)
    assert not sync.unanimous(False)
    with pytest.raises(ValueError, match="no plan"):
        sync.share(None)
