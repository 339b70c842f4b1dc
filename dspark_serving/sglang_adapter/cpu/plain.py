"""A round without drafts as the plain decoding step that it is.

SGLang's worker would send one row a request through its verification path, with logits and features scattered to a full
block a request. On a GPU that is one more graph replay; on CPU it shows in a large batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.dspark_components.dspark_draft import make_next_draft_input
from sglang.srt.speculative.dspark_components.dspark_planner import alloc_verify_window
from sglang.srt.speculative.dspark_components.dspark_verify import verify_logits_adjustments_are_noop

from dspark_serving.sglang_adapter.cpu.commit import LateCommit


def is_plain(batch: Any) -> bool:
    """Whether the target's own sampler needs nothing that only the verification path prepares."""
    return not (batch.has_grammar or batch.return_logprob or batch.return_hidden_states) and (
        verify_logits_adjustments_are_noop(batch.sampling_info)
    )


def run(worker: Any, batch: Any, on_publish: Callable[..., None] | None, late_commit: LateCommit) -> Any:
    """One token for each request, sampled by the target alone; the worker's result of a round with no drafts."""
    bs, stride = len(batch.seq_lens), worker.verify_num_draft_tokens
    prefix_lens = batch.seq_lens
    window = alloc_verify_window(
        batch=batch,
        bs=bs,
        device=worker.device,
        verify_num_draft_tokens=stride,
        block_pos_offsets=worker._block_pos_offsets,
        model_runner=worker.model_runner,
        seq_lens_cpu=batch.seq_lens_cpu,
    )
    _as_decode_step(batch, window)
    output = worker.target_worker.forward_batch_generation(batch, capture_hidden_mode=CaptureHiddenMode.FULL)
    tokens_B = output.next_token_ids.to(torch.int64)
    new_seq_lens = prefix_lens + 1
    if on_publish is not None:
        on_publish(new_seq_lens)
    late_commit.commit_rows(
        batch,
        output.logits_output.hidden_states,
        window.kv_loc_plan,
        torch.arange(0, bs * stride, stride),
        prefix_lens,
    )
    output.logits_output.hidden_states = None
    out_BS = torch.zeros(bs, stride, dtype=torch.int64)
    out_BS[:, 0] = tokens_B
    ones_B = torch.ones(bs, dtype=torch.int32)
    return GenerationBatchResult(
        logits_output=output.logits_output,
        next_token_ids=out_BS.reshape(-1),
        accept_lens=ones_B,
        block_accept_lens=ones_B,
        cap_lens=ones_B,
        can_run_cuda_graph=False,
        next_draft_input=make_next_draft_input(bonus_tokens=tokens_B, new_seq_lens=new_seq_lens),
        speculative_num_draft_tokens=stride,
        new_seq_lens=new_seq_lens,
    )


def _as_decode_step(batch: Any, window: Any) -> None:
    """Give the batch the inputs of a decoding step; the scheduler puts its own back after the round."""
    batch.input_ids = batch.spec_info.bonus_tokens.view(-1)
    batch.out_cache_loc = window.verify_cache_loc_2d[:, 0].contiguous()
    batch.seq_lens = batch.seq_lens + 1
    batch.seq_lens_cpu = batch.seq_lens_cpu + 1
    batch.seq_lens_sum = None
    batch.spec_info = None
