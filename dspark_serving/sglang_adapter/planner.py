"""The scheduler core behind SGLang's planner interface."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.speculative.dspark_components.dspark_planner import DSparkVerifyPlanner
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from dspark_serving.scheduler.policies import Policy


class PolicyPlanner(DSparkVerifyPlanner):
    """Asks a policy for the verify lengths of each round.

    SGLang's constructor makes the planner itself, so the policy comes in by a subclass of its own (`with_policy`).
    """

    initial_policy: Policy

    @classmethod
    def with_policy(cls, policy: Policy) -> type[PolicyPlanner]:
        """A planner class whose instances start with `policy`."""
        return type("PolicyPlanner", (cls,), {"initial_policy": policy})

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.use(self.initial_policy)

    def use(self, policy: Policy) -> None:
        """Plan with `policy` from the next round on."""
        self.policy = policy
        # Full verification is the one case that SGLang serves from a cached layout, without a plan.
        self._is_verify_all = policy.name == "full"

    def resolve_verify_token_budget(
        self,
        *,
        draft_input: Any,
        confidence: torch.Tensor | None,
        prefix_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
    ) -> int | None:
        """Drafted tokens to verify at most, which selects the captured graph: none without drafts, else no bound."""
        return None if self.policy.drafts else 0

    def _schedule_verify_lens(
        self,
        *,
        req_pool_indices: torch.Tensor,
        prefix_lens: torch.Tensor,
        device: torch.device,
        confidence: torch.Tensor | None,
        budget: int | None,
    ) -> torch.Tensor:
        requests = int(req_pool_indices.shape[0])
        if confidence is None:
            confidence = torch.ones(requests, self.gamma, device=device)
        verify_lens = self.policy.verify_lens(confidence).to(device)
        self._tp_sync.sync(SpecTpSyncSite.DSPARK_PLAN, verify_lens)
        return verify_lens
