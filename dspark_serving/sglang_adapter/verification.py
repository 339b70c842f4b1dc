"""The target's side of a round: SGLang's verification, with what a request's sampling asks for applied to every row.

Beside the penalties (penalties.py), SGLang's rejection rule does not know min-p, and it takes top-p of what top-k
leaves, where its plain sampler takes both of the whole distribution. A round must follow the distribution that the
request would be sampled from without speculation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from sglang.srt.speculative.dspark_components.dspark_planner import apply_logits_adjustments_strided
from sglang.srt.speculative.dspark_components.dspark_verify import AcceptOuts, TargetVerifyExecutor, TargetVerifyResult

from dspark_serving.sglang_adapter.penalties import Penalties


class SamplingVerifier(TargetVerifyExecutor):
    """SGLang's executor, which takes and returns what that one does."""

    def __init__(self, *, model_runner: Any, **kwargs: Any) -> None:
        super().__init__(model_runner=model_runner, **kwargs)
        self.penalties = Penalties(model_runner.model_config.vocab_size)

    def run_compact(
        self,
        *,
        batch: Any,
        draft_block_ids: torch.Tensor,
        draft_tokens: torch.Tensor,
        sampling_info: Any,
        **kwargs: Any,
    ) -> tuple[TargetVerifyResult, torch.Tensor]:
        """Verify packed rows; the logits come back as whole blocks."""
        found = super().run_compact(
            batch=batch, draft_block_ids=draft_block_ids, draft_tokens=draft_tokens, sampling_info=None, **kwargs
        )
        ids_BN = torch.cat([draft_block_ids[:, :1], draft_tokens], dim=1)
        self._adjust(batch, ids_BN, found[0].logits_output.next_token_logits, sampling_info)
        return found

    def run_non_compact(
        self, *, batch: Any, verify_ids_2d: torch.Tensor, sampling_info: Any, **kwargs: Any
    ) -> TargetVerifyResult:
        """Verify whole blocks."""
        found = super().run_non_compact(batch=batch, verify_ids_2d=verify_ids_2d, sampling_info=None, **kwargs)
        self._adjust(batch, verify_ids_2d, found.logits_output.next_token_logits, sampling_info)
        return found

    def accept_and_finalize(self, *, target_logits: torch.Tensor, sampling_info: Any, **kwargs: Any) -> AcceptOuts:
        """Accept drafts by the distribution that the request's filters leave."""
        if is_filtered_here(sampling_info):
            target_logits = filtered(target_logits, sampling_info, rows=self.verify_num_draft_tokens)
            sampling_info = dataclasses.replace(sampling_info, need_top_k_sampling=False, need_top_p_sampling=False)
        found = super().accept_and_finalize(target_logits=target_logits, sampling_info=sampling_info, **kwargs)
        self.penalties.accept(found.out_tokens, found.commit_lens)
        return found

    def _adjust(self, batch: Any, ids_BN: torch.Tensor, logits: torch.Tensor, sampling_info: Any) -> None:
        """Penalties before the bias, as SGLang's plain sampler has them."""
        self.penalties.apply(batch, ids_BN, logits.view(*ids_BN.shape, -1))
        apply_logits_adjustments_strided(
            next_token_logits=logits,
            sampling_info=sampling_info,
            verify_num_draft_tokens=self.verify_num_draft_tokens,
        )


def is_filtered_here(sampling_info: Any) -> bool:
    """Whether a batch needs min-p, or both top-k and top-p: one of these alone SGLang does right, without sorting."""
    if sampling_info is None or sampling_info.is_all_greedy:
        return False
    both = sampling_info.need_top_k_sampling and sampling_info.need_top_p_sampling
    return bool(both or sampling_info.need_min_p_sampling)


def filtered(logits: torch.Tensor, sampling_info: Any, *, rows: int) -> torch.Tensor:
    """The logits [B * rows, V], minus infinity at what top-k, top-p and min-p leave out.

    All three are taken of softmax(logits / T) over the whole vocabulary (SGLang's
    `top_k_top_p_min_p_sampling_from_probs_torch`).
    """
    temperatures, top_ks, top_ps, min_ps = (
        getattr(sampling_info, name).view(-1, 1).repeat_interleave(rows, dim=0)
        for name in ("temperatures", "top_ks", "top_ps", "min_ps")
    )
    scaled = logits.float() / temperatures
    width = min(sampling_info.max_top_k or logits.shape[1], logits.shape[1])
    best, index = scaled.topk(width, dim=1)
    probs = (best - scaled.logsumexp(dim=1, keepdim=True)).exp()
    above = probs.cumsum(dim=1) - probs
    ranks = torch.arange(width, device=logits.device)
    kept = (ranks < top_ks) & (above <= top_ps) & (probs >= min_ps * probs[:, :1])
    return torch.full_like(logits, -torch.inf).scatter(1, index, logits.gather(1, index).masked_fill(~kept, -torch.inf))
