"""The draft pass of a round: SGLang's own on CUDA, an eager chain on CPU, none when the plan goes without.

Drafters without a confidence head, or with a better survival map than that, get confidences from their draft
distributions (scheduler/survival_map.py).
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from sglang.srt.speculative.dspark_components.dspark_draft import (
    DraftBlockProposer,
    DraftBlockResult,
    DraftParams,
    DraftProposal,
    resolve_draft_params,
)

from dspark_serving.scheduler.round import Plan
from dspark_serving.scheduler.survival_map import SurvivalMap, draft_statistics
from dspark_serving.sglang_adapter.draws import Chain


class PolicyProposer(DraftBlockProposer):
    """Drafts with SGLang's proposer, unless the plan of the round goes without a draft.

    `plan` is set by the worker before each round.
    """

    plan: Plan
    survival_map: SurvivalMap | None = None
    """Set by the worker where the draft distributions are judged, instead of a confidence head's answer."""

    @property
    def judges(self) -> bool:
        """Whether drafts come with confidences, of the drafter's head or estimated."""
        if getattr(self.draft_model, "confidence_head", None) is not None:
            return True
        return self.survival_map is not None and self._keeps_logits

    @property
    def _keeps_logits(self) -> bool:
        """Whether SGLang's proposer leaves the logits of every step and request, which it does for rejection sampling.

        A draft that is greedy for all (SGLANG_DSPARK_USE_GREEDY_DRAFT) keeps none, the megakernel only those of
        sampled requests.
        """
        return not self._greedy_draft and getattr(self._draft_sampler, "_megakernel_steps", None) is None

    def propose(self, **kwargs: Any) -> DraftProposal:
        """Draft one block for each request of the batch (SGLang's keyword arguments)."""
        if not self.plan.drafts:
            return self._propose_nothing(kwargs["draft_input"], kwargs["bs"], kwargs["sampling_info"])
        proposal = super().propose(**kwargs)
        if self.survival_map is None or not self._keeps_logits:
            return proposal
        return msgspec.structs.replace(proposal, confidence=_estimate(proposal.draft_block, self.survival_map))

    def _estimated(self, chain: Chain, params: DraftParams) -> torch.Tensor | None:
        """Confidences [B, G] of a block that was drafted here, from its distributions; None where a head judges it."""
        if self.survival_map is None or chain.statistics_BG3 is None:
            return None
        return self.survival_map.apply(chain.statistics_BG3, params.step_temperatures)

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


def _estimate(block: DraftBlockResult, survival_map: SurvivalMap) -> torch.Tensor:
    """Confidences [B, G] of a block that SGLang drafted, on its device and without waiting for it."""
    with torch.inference_mode():
        divisor_B = torch.where(block.greedy_mask, 1.0, block.temperatures)
        statistics_BG3 = draft_statistics(block.corrected_logits.float() / divisor_B[:, None, None])
        return survival_map.apply(statistics_BG3, torch.where(block.greedy_mask, 0.0, block.temperatures))
