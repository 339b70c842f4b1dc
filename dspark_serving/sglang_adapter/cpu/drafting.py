"""The draft pass on CPU: one vocabulary projection for the whole block, then gamma small Markov steps, if any.

SGLang's own chain draws Philox noise over the whole vocabulary at every step, greedy or not; written in torch it costs
ten times the draft layers. This one also knows drafters with a reduced vocabulary (`draft_vocab.json`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sglang.srt.speculative.dspark_components.dspark_draft import DraftProposal, resolve_draft_params
from torch.nn.functional import linear

from dspark_serving.sglang_adapter.cpu.linear import PackedWeight, is_packable
from dspark_serving.sglang_adapter.draws import Chain, Draws, sampled_block
from dspark_serving.sglang_adapter.models.block import soft_capped
from dspark_serving.sglang_adapter.proposer import PolicyProposer


class DraftChain:
    """Samples a block left to right: p_k = softmax(base_k + bias(x_{k-1})) (DSpark paper, section 3).

    Args:
        head_VD: rows of the output head, for the ids of `token_ids` or for the whole vocabulary.
        markov_head: SGLang's module of the drafter, whose output rows are cut down to `token_ids` in place; None where
            the tokens of a block are independent (DFlash).
        vocab_size: size of the full vocabulary.
        token_ids: ascending ids that the drafter may propose; None for all.
        judged: whether statistics of the distributions are wanted, for a drafter without a confidence head.
        soft_cap: bound of the logits before the bias; None for none.
    """

    def __init__(
        self,
        head_VD: torch.Tensor,
        markov_head: Any,
        vocab_size: int,
        token_ids: torch.Tensor | None,
        *,
        judged: bool = False,
        soft_cap: float | None = None,
    ) -> None:
        rows_VD = _rows_for(head_VD, token_ids)
        self._project = PackedWeight(rows_VD) if is_packable(rows_VD) else partial(linear, weight=rows_VD)
        self._head_dtype = head_VD.dtype
        self._markov_head = markov_head
        self._vocab_size = vocab_size
        self._token_ids = token_ids
        self._judged = judged
        self._soft_cap = soft_cap
        if token_ids is not None and markov_head is not None:
            rows = _rows_for(markov_head.markov_w2.weight, token_ids)
            markov_head.markov_w2.weight = torch.nn.Parameter(rows, requires_grad=False)

    def draft(
        self,
        hidden_BGD: torch.Tensor,
        anchors_B: torch.Tensor,
        temperatures_B: torch.Tensor,
        greedy_B: torch.Tensor,
    ) -> Chain:
        """Draft gamma tokens a request; rows of `greedy_B` take the most probable token at every step."""
        base_BGV = soft_capped(self._project(hidden_BGD.to(self._head_dtype)), self._soft_cap)
        draws = Draws(temperatures_B, greedy_B, self._vocab_size, self._token_ids, judged=self._judged)
        if self._markov_head is None:  # no token depends on the one before it
            for step in range(hidden_BGD.shape[1]):
                draws.draw(base_BGV[:, step].float())
            return draws.chain()
        state = self._markov_head.init_state(hidden_BGD)
        previous_B = anchors_B
        for step in range(hidden_BGD.shape[1]):
            bias_BV, state = self._markov_head.step_bias(previous_B, hidden_states=hidden_BGD[:, step], state=state)
            previous_B = draws.draw(base_BGV[:, step].float() + bias_BV)
        return draws.chain()


def _rows_for(rows_VD: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
    """The rows of `token_ids`, of a matrix that has a row for each of them or for each token."""
    if token_ids is None or len(rows_VD) == len(token_ids):
        return rows_VD
    return rows_VD[token_ids].contiguous()


class CpuProposer(PolicyProposer):
    """Runs the draft layers through SGLang's model runner and the chain above; `chain` is set by the worker."""

    chain: DraftChain

    @property
    def _keeps_logits(self) -> bool:
        """The chain judges every distribution as it draws from it."""
        return True

    def propose(self, **kwargs: Any) -> DraftProposal:
        """Draft one block for each request of the batch (SGLang's keyword arguments)."""
        if not self.plan.drafts:
            return super().propose(**kwargs)
        bs, sampling_info = kwargs["bs"], kwargs["sampling_info"]
        forward = self._run_forward(
            batch=kwargs["batch"],
            draft_input=kwargs["draft_input"],
            verify_window=kwargs["verify_window"],
            bs=bs,
            device=kwargs["device"],
            embed_module=self.draft_model.embed_tokens,
            anchor_prepared=kwargs.get("anchor_prepared", False),
        )
        anchors_B = forward.draft_block_ids[:, 0]
        params = resolve_draft_params(sampling_info=sampling_info, bs=bs, device=anchors_B.device)
        with torch.inference_mode():
            chain = self.chain.draft(forward.draft_hidden_3d, anchors_B, params.temperatures, params.greedy_mask)
            confidence, confidence_raw = self._estimated(chain, params), None
            if confidence is None and self.draft_model.confidence_head is not None:
                confidence, confidence_raw = self.draft_model.compute_confidence(
                    anchor_tokens=anchors_B, draft_tokens=chain.tokens_BG, confidence_features=forward.raw_hidden
                )
        return DraftProposal(
            draft_block_ids=forward.draft_block_ids[:, : self.gamma],
            draft_block=sampled_block(chain, params),
            confidence=confidence,
            confidence_raw=confidence_raw,
        )
