"""Rejection sampling on CPU, in place of SGLang's Triton kernel of the same name."""

from __future__ import annotations

import torch


def chain_speculative_sampling(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    threshold_single: float,
    threshold_acc: float,
    deterministic: bool,
    *,
    block_verification: bool = False,
) -> None:
    """Accept the longest prefix of each chain by the rule of speculative sampling, then draw one more token.

    Draft x_k is accepted with probability min(1, p(x_k) / q(x_k)); the token after the accepted prefix comes from
    norm(max(0, p - q)) on a rejection and from p when all were accepted (arXiv 2211.17192, section 2.3).

    Shapes: candidates [B, N] (the anchor first), target_probs [B, N, V], draft_probs [B, N - 1, V], uniform_samples
    [B, N - 1], uniform_samples_for_final_sampling [B]. Written in place: predicts [B * N] (the token after each row),
    accept_index [B, N], accept_token_num [B] (drafts only). The thresholds are 1 for a lossless rule and, like the
    tree links of a chain, not read.
    """
    requests, width = candidates.shape
    drafts = candidates[:, 1:, None]
    p = target_probs[:, :-1].gather(2, drafts).squeeze(2)
    q = draft_probs.gather(2, drafts).squeeze(2)
    accepted = (q > 0) & (uniform_samples * q < p)
    counts = accepted.long().cumprod(1).sum(1)
    final = _draw_final(target_probs, draft_probs, counts, uniform_samples_for_final_sampling)
    following = torch.cat([candidates[:, 1:], final[:, None]], dim=1)
    following[torch.arange(requests), counts] = final
    reached = torch.arange(width) <= counts[:, None]
    predicts[retrive_index[reached].long()] = following[reached].to(predicts.dtype)
    accept_index[reached] = retrive_index[reached].to(accept_index.dtype)
    accept_token_num.copy_(counts)


def _draw_final(
    target_probs: torch.Tensor, draft_probs: torch.Tensor, counts: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """One token [B] after `counts` accepted drafts, by inverting the cumulative residual at `uniform`."""
    rows = torch.arange(counts.numel())
    gamma = draft_probs.shape[1]
    p = target_probs[rows, counts].double()
    q = draft_probs[rows, counts.clamp_max(gamma - 1)].double()
    residual = torch.where((counts < gamma)[:, None], (p - q).clamp_min(0.0), p)
    # p == q up to rounding: nothing is left of the residual, and p is what it stands for.
    residual = torch.where(residual.sum(1, keepdim=True) > 0, residual, p)
    cumulative = residual.cumsum(1)
    drawn = torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    # A draw at the very end must not land on a token that has no probability.
    last = residual.shape[1] - 1 - (residual.flip(1) > 0).to(torch.int8).argmax(1)
    return torch.minimum(drawn, last)
