"""What runs at each hook of the table in hooks.py. SGLang's heavy modules are imported only when a handler runs."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

from dspark_serving import __version__
from dspark_serving.sglang_adapter import options, resolution

logger = logging.getLogger(__name__)


def add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    """After ServerArgs.add_cli_args: our flags."""
    options.add_cli_args(parser)


def from_cli_args(result: Any, cls: type, args: argparse.Namespace) -> None:
    """After ServerArgs.from_cli_args: our options, and a free port."""
    options.attach(result, args)
    resolution.check_port(result.host, result.port)


def before_resolution(server_args: Any) -> None:
    """Before ServerArgs.resolve_once."""
    if not getattr(server_args, "_resolution_finished", False):
        resolution.prepare(server_args, options.config_of(server_args))


def handle_dspark(original: Callable[[Any], None], server_args: Any) -> None:
    """Around SGLang's resolution of DSPARK, which looks at the device's name and nothing else of it."""
    resolution.resolve_as_cuda(original, server_args)


def handle_model(original: Callable[[Any], None], server_args: Any) -> None:
    """Around SGLang's resolution of what a model asks for, which knows attention backends by name."""
    resolution.resolve_as_triton(original, server_args)


def create_worker(original: Callable[..., type], self: Any, server_args: Any) -> type:
    """Around SpeculativeAlgorithm.create_worker: our worker for DSPARK, SGLang's for everything else."""
    if not self.is_dspark() or options.config_of(server_args).disable:
        return original(self, server_args)
    from dspark_serving.sglang_adapter import hooks
    from dspark_serving.sglang_adapter.worker import DsparkServingWorker

    hooks.check_applied()
    logger.info("dspark-serving %s is active and serves DSPARK", __version__)
    return DsparkServingWorker


def get_internal_state(result: Any, self: Any, recv_req: Any) -> None:
    """After the scheduler's internal state was gathered: ours, under the key `dspark`."""
    worker = self.scheduler.draft_worker
    report = getattr(worker, "dspark_report", None)
    result.internal_state["dspark"] = {"active": False} if report is None else report()


def update_handlers(result: dict[str, Any], self: Any) -> None:
    """After SGLang listed what can be updated while it runs: our policy and recording too."""
    worker = self.scheduler.draft_worker
    if hasattr(worker, "dspark_report"):
        from dspark_serving.sglang_adapter import scheduling

        result.update(scheduling.update_handlers(worker))


def scheduler_is_ready(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """After the scheduler was constructed: nothing is served yet, so the engine can be measured."""
    if hasattr(scheduler.draft_worker, "dspark_report"):
        from dspark_serving.sglang_adapter import scheduling

        scheduling.start(scheduler)


def add_routes(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Before the HTTP server runs: our routes."""
    if options.config_of(server_args).disable:
        return
    from sglang.srt.entrypoints import http_server

    from dspark_serving.sglang_adapter import routes

    http_server.app.include_router(routes.router(http_server.get_global_state))


def require_markov(self: Any) -> bool:
    """Instead of asking for a Markov head: a drafter without one is served, and build_markov_head says which."""
    return True


def build_markov_head(original: Callable[..., Any], config: Any) -> Any:
    """Around the choice of the Markov head: none for our block drafters of rank 0."""
    from dspark_serving.sglang_adapter.models import block

    if block.ARCHITECTURE in (config.architectures or []) and not config.markov_rank:
        return block.NoMarkov(config.vocab_size)
    return original(config)


def configure_capture(original: Callable[..., None], **wanted: Any) -> None:
    """Around the request for the outputs of the target's layers."""
    from dspark_serving.sglang_adapter import targets

    if not (wanted["is_dspark"] and wanted["dflash_use_aux_hidden_state"]) or not targets.capture_layers(
        wanted["model"], wanted["dflash_target_layer_ids"]
    ):
        original(**wanted)


def chain_speculative_sampling(*args: Any, **kwargs: Any) -> None:
    """Instead of the Triton kernel."""
    from dspark_serving.sglang_adapter.cpu import sampling

    sampling.chain_speculative_sampling(*args, **kwargs)


def draft_probs(original: Callable[..., Any], draft_block: Any, vocab: int, device: Any) -> Any:
    """Around the draft distributions of the rejection rule."""
    from dspark_serving.sglang_adapter import draws

    return draws.sampled_probabilities(original, draft_block, vocab, device)


def adjustments_are_noop(original: Callable[[Any], bool], sampling_info: Any) -> bool:
    """Around the question whether logits may go unadjusted into acceptance."""
    from dspark_serving.sglang_adapter import penalties

    return original(sampling_info) and not penalties.is_asked_for(sampling_info)


def no_fused_kv_write(self: Any, pool: Any) -> None:
    """Instead of building the fused KV write: SGLang falls back to plain torch."""


def forget_packed_weight(result: None, self: Any, layer: Any) -> None:
    """After the weights of a linear layer or a head were loaded."""
    from dspark_serving.sglang_adapter.cpu import linear

    linear.reset(layer)


def apply_linear(original: Callable[..., Any], self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
    """Around an unquantised linear layer."""
    from dspark_serving.sglang_adapter.cpu import linear

    packed = linear.packed_weight(layer)
    return original(self, layer, x, bias) if packed is None else packed(x, bias)


def compute_lm_head(
    original: Callable[..., Any],
    self: Any,
    hidden_states: Any,
    lm_head: Any,
    embedding_bias: Any = None,
    **kwargs: Any,
) -> Any:
    """Around the projection to the vocabulary: only the plain bf16 product, which SGLang writes as a matmul."""
    from dspark_serving.sglang_adapter.cpu import linear

    special = self.use_fp32_lm_head or self.rl_on_policy_target is not None or hasattr(lm_head, "set_lora")
    if not special and hasattr(lm_head, "weight"):
        packed = linear.packed_weight(lm_head)
        if packed is not None:
            return packed(hidden_states.to(lm_head.weight.dtype))
    return original(self, hidden_states, lm_head, embedding_bias, **kwargs)
