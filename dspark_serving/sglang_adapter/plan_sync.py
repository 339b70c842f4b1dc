"""One plan for all ranks: times differ from rank to rank, so only one of them may decide."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dspark_serving.scheduler.round import Plan

_REASONS = 64  # bytes of the reason that travel


class PlanSync:
    """Broadcasts the plan of the first rank of a tensor-parallel group; a group of one costs nothing.

    Args:
        group: a process group on the host (gloo); None for one rank.
        source: global rank that decides.
    """

    def __init__(self, group: Any | None, source: int = 0) -> None:
        self._group = group
        self._source = source
        self.decides = group is None or dist.get_rank() == source

    def share(self, plan: Plan | None) -> Plan:
        """The deciding rank's plan, on every rank; the others pass None."""
        if self._group is None:
            if plan is None:
                raise ValueError("the deciding rank has no plan")
            return plan
        numbers = torch.zeros(5, dtype=torch.float64)
        reason = torch.zeros(_REASONS, dtype=torch.uint8)
        if plan is not None:
            numbers = torch.tensor(
                [plan.drafts, plan.price, plan.capacity, plan.expected_tokens, plan.expected_seconds],
                dtype=torch.float64,
            )
            label = plan.reason.encode()[:_REASONS]
            reason[: len(label)] = torch.tensor(list(label), dtype=torch.uint8)
        message = torch.cat([numbers.view(torch.uint8), reason])
        dist.broadcast(message, src=self._source, group=self._group)
        drafts, price, capacity, tokens, seconds = message[: 5 * 8].view(torch.float64).tolist()
        text = bytes(message[5 * 8 :].tolist()).rstrip(b"\0").decode()
        return Plan(bool(drafts), price, int(capacity), text, tokens, seconds)

    def agree(self, flag: bool) -> bool:
        """The deciding rank's `flag`, on every rank."""
        if self._group is None:
            return flag
        message = torch.tensor([flag], dtype=torch.uint8)
        dist.broadcast(message, src=self._source, group=self._group)
        return bool(message.item())

    def unanimous(self, flag: bool) -> bool:
        """Whether every rank's `flag` is set."""
        if self._group is None:
            return flag
        message = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(message, op=dist.ReduceOp.MIN, group=self._group)
        return bool(message.item())
