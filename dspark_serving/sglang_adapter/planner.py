"""The scheduler core behind SGLang's planner interface."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.speculative.dspark_components.dspark_planner import DSparkVerifyPlanner, local_verify_tier_num_tokens
from sglang.srt.speculative.ragged_verify import RaggedVerifyMode, read_ragged_verify_mode
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from dspark_serving.scheduler.round import Batch, Plan, Policy
from dspark_serving.sglang_adapter.device import DeviceAdmission, HostCopy
from dspark_serving.sglang_adapter.plan_sync import PlanSync
from dspark_serving.sglang_adapter.rounds import BatchReader


class PolicyPlanner(DSparkVerifyPlanner):
    """Asks a policy for the plan of each round and for the verify lengths under it.

    `policy` and `plan_sync` are set by the worker; SGLang's constructor makes the planner itself.
    """

    policy: Policy
    plan_sync: PlanSync
    device_admission: DeviceAdmission | None = None  # where the confidences are not on the host
    plan: Plan
    batch: Batch
    confidence_RG: HostCopy | None  # of the round, once drafted
    verify_lens_R: HostCopy
    _planned_ahead: bool = False

    def __init__(self, *, draft_model: Any, **kwargs: Any) -> None:
        headless = getattr(draft_model, "confidence_head", None) is None
        if headless and read_ragged_verify_mode() is not RaggedVerifyMode.STATIC:
            # SGLang's constructor asks for a head and never calls it; the proposer estimates in its place.
            super().__init__(draft_model=SimpleNamespace(confidence_head=SimpleNamespace()), **kwargs)
            self.draft_model = draft_model
        else:
            super().__init__(draft_model=draft_model, **kwargs)

    def begin(self, batch: Any) -> Plan:
        """Plan the round of `batch` from earlier rounds; with overlap this was done when the batch was prepared."""
        if not self._planned_ahead:
            self._decide(batch)
        self._planned_ahead = False
        return self.plan

    def _decide(self, batch: Any) -> None:
        if not hasattr(self, "_reader"):
            self._reader = BatchReader(self.model_runner.req_to_token_pool.req_generation)
        self.batch = self._reader.read(batch)
        self.plan = self.plan_sync.share(self.policy.plan(self.batch) if self.plan_sync.decides else None)
        whole = self.batch.requests * self.gamma
        # Full verification is the one case that SGLang serves from a cached layout, without a plan.
        self._is_verify_all = self.plan.drafts and self.plan.price <= 0 and self.plan.capacity >= whole
        self.confidence_RG = None
        verify_len = self.gamma + 1 if self.plan.drafts else 1
        self.verify_lens_R = HostCopy(torch.full((self.batch.requests,), verify_len, dtype=torch.int32))

    def prepare_verify_budget(self, batch: Any, future_map: Any) -> None:
        """Under overlap: plan before the draft is launched, because the amount selects the captured graph."""
        draft_input = batch.spec_info
        if self._budget_planner is None or draft_input is None:
            return super().prepare_verify_budget(batch, future_map)
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            return super().prepare_verify_budget(batch, future_map)
        self._decide(batch)
        self._planned_ahead = True
        draft_input.verify_token_budget = self._budget()
        batch.spec_verify_tier_num_tokens = local_verify_tier_num_tokens(
            bs=batch.batch_size(),
            verify_token_budget=draft_input.verify_token_budget,
            verify_num_draft_tokens=self.verify_num_draft_tokens,
            min_verify_len=self._schedule_cfg.min_verify_len,
        )
        self._maybe_gather_dp_verify_tier(batch=batch, local_tier_num_tokens=batch.spec_verify_tier_num_tokens)
        return None

    def _budget(self) -> int:
        return min(self.plan.capacity, self.batch.requests * self.gamma) if self.plan.drafts else 0

    def resolve_verify_token_budget(
        self,
        *,
        draft_input: Any,
        confidence: torch.Tensor | None,
        prefix_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
    ) -> int | None:
        """Drafted tokens to verify at most, which selects the captured graph."""
        if confidence is not None:
            self.confidence_RG = HostCopy(confidence.float())
        return self._budget()

    def _schedule_verify_lens(
        self,
        *,
        req_pool_indices: torch.Tensor,
        prefix_lens: torch.Tensor,
        device: torch.device,
        confidence: torch.Tensor | None,
        budget: int | None,
    ) -> torch.Tensor:
        terms = None if self.device_admission is None else self.policy.terms(self.batch)
        if self.confidence_RG is None:
            verify_lens = torch.ones(self.batch.requests, dtype=torch.int32, device=device)
        elif self.device_admission is not None and terms is not None and confidence is not None:
            verify_lens = self.device_admission(confidence, self.plan, self.batch, terms)
        else:  # on an accelerator this waits for the drafts
            lens_R = self.policy.admit(self.batch, self.plan, self.confidence_RG.numpy())
            verify_lens = torch.from_numpy(lens_R).to(device)
        self._tp_sync.sync(SpecTpSyncSite.DSPARK_PLAN, verify_lens)
        self.verify_lens_R = HostCopy(verify_lens)
        return verify_lens
