"""The draft pass of a round: SGLang's own on CUDA, an eager chain on CPU, none when the plan goes without."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.speculative.dspark_components.dspark_draft import (
    DraftBlockProposer,
    DraftBlockResult,
    DraftProposal,
    resolve_draft_params,
)

from dspark_serving.scheduler.round import Plan


class PolicyProposer(DraftBlockProposer):
    """Drafts with SGLang's proposer, unless the plan of the round goes without a draft.

    `plan` is set by the worker before each round.
    """

    plan: Plan

    def propose(self, **kwargs: Any) -> DraftProposal:
        """Draft one block for each request of the batch (SGLang's keyword arguments)."""
        if self.plan.drafts:
            return super().propose(**kwargs)
        return self._propose_nothing(kwargs["draft_input"], kwargs["bs"], kwargs["sampling_info"])

    def _propose_nothing(self, draft_input: Any, bs: int, sampling_info: Any) -> DraftProposal:
        """A block of which no token is verified: mask tokens behind the anchor, as certain drafts.

        A certain draft that is rejected leaves the target's distribution of the next token untouched.
        """
        anchors = draft_input.bonus_tokens.view(-1)
        block_ids = self.draft_block_ids_view(bs=bs, device=anchors.device)
        block_ids[:, 0] = anchors
        params = resolve_draft_params(sampling_info=sampling_info, bs=bs, device=anchors.device)
        block = DraftBlockResult(
            draft_tokens=torch.full((bs, self.gamma), self._mask_token_id, dtype=torch.int64, device=anchors.device),
            corrected_logits=None,
            greedy_mask=params.greedy_mask,
            temperatures=params.temperatures,
            greedy_draft=True,
        )
        return DraftProposal(draft_block_ids=block_ids[:, : self.gamma], draft_block=block)
