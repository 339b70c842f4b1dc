"""What classes of ours extend, call or stand in for in SGLang, beside the hooks of hooks.py."""

from __future__ import annotations

from typing import NamedTuple


class Base(NamedTuple):
    """One symbol of SGLang that a class of ours overrides or calls."""

    symbol: str
    signature: str
    """Names of its parameters when this release was built."""
    why: str


_SPEC = "sglang.srt.speculative"
_DSPARK = f"{_SPEC}.dspark_components"

BASES = (
    Base(
        f"{_DSPARK}.dspark_worker_v2.DSparkWorkerV2.__init__",
        "self, server_args, gpu_id, nccl_port, target_worker, draft_worker_cls", "the worker that ours extends",
    ),
    Base(
        f"{_DSPARK}.dspark_worker_v2.DSparkWorkerV2._forward_decode",
        "self, batch, on_publish, grammar_barrier, coordination_plan", "one round; timed, and fed on CPU",
    ),
    Base(
        f"{_SPEC}.base_spec_worker.BaseSpecWorker.on_verify_complete_cpu",
        "self, num_correct_drafts_per_req, batch_size", "accepted length, on the host",
    ),
    Base(
        f"{_DSPARK}.dspark_planner.DSparkVerifyPlanner.resolve_verify_token_budget",
        "self, draft_input, confidence, prefix_lens, req_pool_indices", "the planner that ours extends",
    ),
    Base(
        f"{_DSPARK}.dspark_planner.DSparkVerifyPlanner._schedule_verify_lens",
        "self, req_pool_indices, prefix_lens, device, confidence, budget", "verify lengths of a round",
    ),
    Base(
        f"{_DSPARK}.dspark_draft.DraftBlockProposer.propose",
        "self, batch, draft_input, verify_window, bs, device, target_model, sampling_info, anchor_prepared",
        "the draft pass that ours extends",
    ),
    Base(
        f"{_DSPARK}.dspark_draft.DraftBlockProposer._run_forward",
        "self, batch, draft_input, verify_window, bs, device, embed_module, draft_sampler, sampling_info, "
        "anchor_prepared", "the draft layers on CPU",
    ),
    Base(
        f"{_DSPARK}.dspark_draft.resolve_draft_params", "sampling_info, bs, device, out", "temperatures of a batch",
    ),
    Base(
        f"{_DSPARK}.dspark_verify.TargetVerifyExecutor.run_compact",
        "self, batch, layout, draft_block_ids, draft_tokens, bs, device, sampling_info, verify_window, inject_gate",
        "timed, and its logits adjusted",
    ),
    Base(
        f"{_DSPARK}.dspark_verify.TargetVerifyExecutor.run_non_compact",
        "self, batch, draft_input, verify_ids_2d, verify_window, sampling_info", "timed, and its logits adjusted",
    ),
    Base(
        f"{_DSPARK}.dspark_verify.TargetVerifyExecutor.accept_and_finalize",
        "self, folded_accept, bs, verify_ids_2d, target_logits, draft_block, sampling_info, draft_input, layout, "
        "prefix_lens, draft_tokens, simulate_bonus_sampling_info", "timed, and its filters completed",
    ),
    Base(
        f"{_DSPARK}.dspark_planner.apply_logits_adjustments_strided",
        "next_token_logits, sampling_info, verify_num_draft_tokens", "logit bias and custom processors",
    ),
    Base(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend",
        "self, q, k, v, layer, forward_batch, save_kv_cache", "the attention backend that ours extends on CPU",
    ),
    Base(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_decode",
        "self, q, k, v, layer, forward_batch, save_kv_cache", "the attention backend that ours extends on CPU",
    ),
    Base(
        f"{_DSPARK}.dspark_worker_v2.DSparkWorkerV2._forward_prefill",
        "self, batch, on_publish, pp_proxy_tensors",
        "interrupts the measured rounds",
    ),
    Base(
        f"{_DSPARK}.dspark_planner.DSparkVerifyPlanner.prepare_verify_budget",
        "self, batch, future_map",
        "the amount under overlap, before the draft is launched",
    ),
    Base(
        f"{_DSPARK}.dspark_planner.alloc_verify_window",
        "batch, bs, device, verify_num_draft_tokens, block_pos_offsets, model_runner, seq_lens_cpu, bonus, "
        "anchor_ids",
        "cache rows of a plain round on CPU",
    ),
    Base(
        f"{_DSPARK}.dspark_planner.local_verify_tier_num_tokens",
        "bs, verify_token_budget, verify_num_draft_tokens, min_verify_len",
        "the graph tier of a plan",
    ),
    Base(
        f"{_DSPARK}.dspark_planner.HostConfidenceBudgetPlanner.compute_budget",
        "self, confidence, generation, current_generation, req_pool_indices_cpu",
        "policy native",
    ),
    Base(
        "sglang.kernels.ops.speculative.dspark.dspark_schedule.schedule_verify_lens_topk",
        "confidence, budget, cfg",
        "policy native",
    ),
    Base(
        f"{_DSPARK}.dspark_verify.TargetVerifyExecutor.commit_hidden",
        "self, batch, layout, hidden_strided, verify_window, logits_output, commit_lens, bs, run_compact",
        "late commits on CPU take its place",
    ),
    Base(
        f"{_DSPARK}.dspark_verify.verify_logits_adjustments_are_noop",
        "sampling_info",
        "which batches may take a plain round on CPU",
    ),
    Base(
        f"{_DSPARK}.dspark_draft.make_next_draft_input",
        "bonus_tokens, new_seq_lens",
        "what a plain round leaves to the next",
    ),
    Base(
        f"{_DSPARK}.dspark_kv_inject.TargetHiddenKvInjector.inject_target_hidden",
        "self, target_hidden, cache_loc, positions, cache_loc_2d, commit_lens, state_slot, final_pos, "
        "target_hidden_is_projected",
        "late commits on CPU",
    ),
    Base(
        f"{_DSPARK}.dspark_kv_inject.TargetHiddenKvInjector.ids_for",
        "self, plan, cols",
        "cache rows of late commits",
    ),
    Base(
        "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        "self, batch, forward_batch, pp_proxy_tensors, is_verify, skip_attn_backend_init, "
        "capture_hidden_mode, return_kv_loc_plan",
        "the target in a plain round on CPU",
    ),
    Base(
        "sglang.srt.managers.scheduler.Scheduler._forward_isolation",
        "self, batch, overlap",
        "rounds of the profile",
    ),
    Base(
        "sglang.srt.managers.overlap_utils.resolve_forward_inputs",
        "batch, future_map",
        "rounds of the profile",
    ),
    Base(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.init_new",
        "cls, reqs, req_to_token_pool, token_to_kv_pool_allocator, tree_cache, model_config, enable_overlap, "
        "spec_algorithm, chunked_req, dllm_config",
        "requests of the profile",
    ),
    Base(
        "sglang.srt.managers.schedule_batch.Req.init_next_round_input",
        "self, tree_cache, cow_mamba",
        "requests of the profile",
    ),
    Base(
        "sglang.srt.mem_cache.common.release_kv_cache",
        "req, tree_cache, checkpoint",
        "requests of the profile",
    ),
    Base(
        "sglang.srt.models.dspark.DSparkDraftMixin.__init__",
        "self, config, quant_config, prefix",
        "the drafter that ours extends",
    ),
    Base(
        "sglang.srt.models.dspark.DSparkDraftMixin.attach_shared_modules",
        "self, embed_tokens, lm_head",
        "the target's embedding and head, or the drafter's own",
    ),
    Base(
        "sglang.srt.models.dspark.DSparkDraftMixin.compute_base_logits",
        "self, hidden",
        "capped logits, reduced vocabularies",
    ),
    Base(
        "sglang.srt.models.dspark.DSparkDraftMixin._stacked_ctx_kv_params",
        "self",
        "context keys and values of other layers than Qwen3's",
    ),
    Base(
        "sglang.srt.models.dspark.BaseDSparkMarkovHead.step_bias",
        "self, prev_tokens, hidden_states, state",
        "the head of a drafter without one",
    ),
    Base(
        "sglang.srt.models.dflash.DFlashAttention.__init__",
        "self, config, layer_id, quant_config, prefix",
        "draft layers of Llama and Gemma 4",
    ),
    Base(
        "sglang.srt.models.dflash.DFlashAttention.kv_proj_only",
        "self, hidden_states",
        "context keys and values of Gemma 4",
    ),
    Base(
        "sglang.srt.models.dflash.DFlashDecoderLayer.forward",
        "self, positions, hidden_states, forward_batch, residual",
        "what a draft layer is called with",
    ),
    Base(
        "sglang.srt.models.qwen2.Qwen2ForCausalLM.set_eagle3_layers_to_capture",
        "self, layer_ids",
        "features of Qwen2",
    ),
)  # fmt: skip
