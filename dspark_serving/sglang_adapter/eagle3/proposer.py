"""Eagle3's draft pass: one token after the other, each through the drafter's layer, eager on every device."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.speculative.dspark_components.dspark_draft import DraftProposal, resolve_draft_params
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from dspark_serving.sglang_adapter.draws import Chain, Draws, sampled_block
from dspark_serving.sglang_adapter.eagle3.context import ChainContext
from dspark_serving.sglang_adapter.proposer import PolicyProposer


class ChainProposer(PolicyProposer):
    """Drafts gamma tokens in gamma decoding steps of the drafter.

    Step k reads and writes row prefix - 1 + k of the drafter's cache: the first one the last committed row, the others
    rows of the verify window, which are written again with the target's features when they are committed. The worker
    sets what follows.
    """

    context: ChainContext
    vocab_size: int
    token_ids: torch.Tensor | None
    """Ids that the drafter may propose, ascending; None for the whole vocabulary."""
    cuts_logits: bool
    """Whether logits come for every token though only `token_ids` may be proposed."""

    def propose(self, **kwargs: Any) -> DraftProposal:
        """Draft one block for each request of the batch (SGLang's keyword arguments)."""
        proposal = self._propose_chain(**kwargs) if self.plan.drafts else super().propose(**kwargs)
        self.context.drafted_RG = proposal.draft_block.draft_tokens
        return proposal

    def _propose_chain(
        self, *, batch: Any, draft_input: Any, verify_window: Any, bs: int, sampling_info: Any, **unused: Any
    ) -> DraftProposal:
        anchors_B = draft_input.bonus_tokens.view(-1)
        block_ids = self.draft_block_ids_view(bs=bs, device=anchors_B.device)
        block_ids[:, 0] = anchors_B
        params = resolve_draft_params(sampling_info=sampling_info, bs=bs, device=anchors_B.device)
        judged = self.survival_map is not None
        draws = Draws(params.temperatures, params.greedy_mask, self.vocab_size, self.token_ids, judged=judged)
        with torch.inference_mode():
            chain = self._draft(batch, anchors_B, verify_window.verify_cache_loc_2d, draws)
            confidence = self._estimated(chain, params)
        return DraftProposal(draft_block_ids=block_ids, draft_block=sampled_block(chain, params), confidence=confidence)

    def _draft(self, batch: Any, anchors_B: torch.Tensor, window_BS: torch.Tensor, draws: Draws) -> Chain:
        """Args: window_BS: cache slots of the verify window, from the anchor's position on."""
        hidden_BD, cache_loc_B = self.context.first_rows(batch)
        tokens_B = anchors_B
        for step in range(self.gamma):
            if step:
                cache_loc_B = window_BS[:, step - 1].contiguous()
            logits_BV, hidden_BD = self._step(batch, step, tokens_B, hidden_BD, cache_loc_B)
            tokens_B = self._tp_sync.sync(SpecTpSyncSite.DSPARK_DRAFT, draws.draw(logits_BV))
        return draws.chain()

    def _step(
        self, batch: Any, step: int, tokens_B: torch.Tensor, hidden_BD: torch.Tensor, cache_loc_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 logits of the next token [B, V] and the layer's output [B, D]."""
        lens_cpu = None if batch.seq_lens_cpu is None else batch.seq_lens_cpu + step
        forward_batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=len(tokens_B),
            input_ids=tokens_B,
            req_pool_indices=batch.req_pool_indices,
            seq_lens=batch.seq_lens + step,
            out_cache_loc=cache_loc_B,
            seq_lens_sum=None if lens_cpu is None else int(lens_cpu.sum()),
            seq_lens_cpu=lens_cpu,
            positions=batch.seq_lens - 1 + step,
            input_embeds=hidden_BD,
            spec_algorithm=SpeculativeAlgorithm.DSPARK,
            capture_hidden_mode=CaptureHiddenMode.FULL,
        )
        self.draft_model_runner.kv_index_translator.bind_own_plan(forward_batch)
        output = self.draft_model_runner.forward(forward_batch).logits_output
        logits_BV = output.next_token_logits.float()
        return logits_BV[:, self.token_ids] if self.cuts_logits else logits_BV, output.hidden_states
