"""The draft pass on CPU: one vocabulary projection for the whole block, then gamma small Markov steps, if any.

SGLang's own chain draws Philox noise over the whole vocabulary at every step, greedy or not; written in torch it costs
ten times the draft layers. This one also knows drafters with a reduced vocabulary (`draft_vocab.json`).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from sglang.srt.speculative.dspark_components.dspark_draft import DraftBlockResult, DraftProposal, resolve_draft_params
from torch.nn.functional import linear

from dspark_serving.sglang_adapter.cpu.linear import PackedWeight, is_packable
from dspark_serving.sglang_adapter.models.block import soft_capped
from dspark_serving.sglang_adapter.proposer import PolicyProposer


class SampledBlock(DraftBlockResult, frozen=True):  # type: ignore[call-arg]  # a msgspec.Struct, not typed here
    """A drafted block that carries the distributions its tokens were drawn from."""

    draft_probs: torch.Tensor | None = None
    """[B, gamma, V] fp32; rejection must use these and nothing recomputed (DeepSpec issue 31)."""


class Chain(NamedTuple):
    """Tokens drafted for B requests."""

    tokens_BG: torch.Tensor
    probs_BGV: torch.Tensor | None
    """Distributions over the full vocabulary; None when every request is greedy."""


class DraftChain:
    """Samples a block left to right: p_k = softmax(base_k + bias(x_{k-1})) (DSpark paper, section 3).

    Args:
        head_VD: rows of the output head, for the ids of `token_ids` or for the whole vocabulary.
        markov_head: SGLang's module of the drafter, whose output rows are cut down to `token_ids` in place; None where
            the tokens of a block are independent (DFlash).
        vocab_size: size of the full vocabulary.
        token_ids: ascending ids that the drafter may propose; None for all.
        soft_cap: bound of the logits before the bias; None for none.
    """

    def __init__(
        self,
        head_VD: torch.Tensor,
        markov_head: Any,
        vocab_size: int,
        token_ids: torch.Tensor | None,
        soft_cap: float | None = None,
    ) -> None:
        rows_VD = _rows_for(head_VD, token_ids)
        self._project = PackedWeight(rows_VD) if is_packable(rows_VD) else partial(linear, weight=rows_VD)
        self._head_dtype = head_VD.dtype
        self._markov_head = markov_head
        self._vocab_size = vocab_size
        self._token_ids = token_ids
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
        all_greedy = bool(greedy_B.all())
        if self._markov_head is None:
            return self._draft_independent(base_BGV.float(), temperatures_B, greedy_B, all_greedy=all_greedy)
        state = self._markov_head.init_state(hidden_BGD)
        previous_B, tokens, probs = anchors_B, [], []
        for step in range(hidden_BGD.shape[1]):
            bias_BV, state = self._markov_head.step_bias(previous_B, hidden_states=hidden_BGD[:, step], state=state)
            logits_BV = base_BGV[:, step].float() + bias_BV
            index_B = logits_BV.argmax(dim=1)
            if not all_greedy:
                probs.append((logits_BV / temperatures_B[:, None]).softmax(dim=1))
                drawn_B = torch.multinomial(probs[-1], 1).squeeze(1)
                index_B = torch.where(greedy_B, index_B, drawn_B)
            previous_B = index_B if self._token_ids is None else self._token_ids[index_B]
            tokens.append(previous_B)
        full_BGV = None if all_greedy else self._to_full_vocabulary(torch.stack(probs, dim=1))
        return Chain(torch.stack(tokens, dim=1), full_BGV)

    def _draft_independent(
        self, logits_BGV: torch.Tensor, temperatures_B: torch.Tensor, greedy_B: torch.Tensor, *, all_greedy: bool
    ) -> Chain:
        """All tokens of a block at once: none depends on the one before it."""
        index_BG, full_BGV = logits_BGV.argmax(dim=2), None
        if not all_greedy:
            probs_BGV = (logits_BGV / temperatures_B[:, None, None]).softmax(dim=2)
            drawn_BG = torch.multinomial(probs_BGV.flatten(0, 1), 1).view_as(index_BG)
            index_BG = torch.where(greedy_B[:, None], index_BG, drawn_BG)
            full_BGV = self._to_full_vocabulary(probs_BGV)
        return Chain(index_BG if self._token_ids is None else self._token_ids[index_BG], full_BGV)

    def _to_full_vocabulary(self, probs_BGV: torch.Tensor) -> torch.Tensor:
        if self._token_ids is None:
            return probs_BGV
        full_BGV = probs_BGV.new_zeros(*probs_BGV.shape[:2], self._vocab_size)
        full_BGV[..., self._token_ids] = probs_BGV
        return full_BGV


def _rows_for(rows_VD: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
    """The rows of `token_ids`, of a matrix that has a row for each of them or for each token."""
    if token_ids is None or len(rows_VD) == len(token_ids):
        return rows_VD
    return rows_VD[token_ids].contiguous()


class CpuProposer(PolicyProposer):
    """Runs the draft layers through SGLang's model runner and the chain above; `chain` is set by the worker."""

    chain: DraftChain

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
            confidence = confidence_raw = None
            if self.draft_model.confidence_head is not None:
                confidence, confidence_raw = self.draft_model.compute_confidence(
                    anchor_tokens=anchors_B, draft_tokens=chain.tokens_BG, confidence_features=forward.raw_hidden
                )
        block = SampledBlock(
            draft_tokens=chain.tokens_BG,
            corrected_logits=None,
            greedy_mask=params.greedy_mask,
            temperatures=params.temperatures,
            greedy_draft=chain.probs_BGV is None,
            draft_probs=chain.probs_BGV,
        )
        return DraftProposal(
            draft_block_ids=forward.draft_block_ids[:, : self.gamma],
            draft_block=block,
            confidence=confidence,
            confidence_raw=confidence_raw,
        )


def sampled_probabilities(original: Any, draft_block: DraftBlockResult, vocab: int, device: Any) -> torch.Tensor:
    """Around SGLang's `_draft_probs`: a block sampled here brings the very distributions it was drawn from."""
    if isinstance(draft_block, SampledBlock) and draft_block.draft_probs is not None:
        return draft_block.draft_probs
    return original(draft_block, vocab, device)
