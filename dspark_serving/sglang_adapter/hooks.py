"""Every place where this package touches SGLang, in one table."""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from dspark_serving.config import load_config
from dspark_serving.errors import EnvironmentMismatchError
from dspark_serving.sglang_adapter import handlers, models
from dspark_serving.sglang_adapter.bases import BASES
from dspark_serving.sglang_adapter.cpu import enable
from dspark_serving.sglang_adapter.cpu.standins import has_accelerator


class Seam(NamedTuple):
    """One symbol of SGLang that this package hooks."""

    symbol: str
    kind: HookType
    handler: Callable[..., Any]
    signature: str
    """Names of its parameters when this release was built; a change means that the handler must be read again."""
    why: str
    cpu_only: bool = False


_SPEC = "sglang.srt.speculative"
_DSPARK = f"{_SPEC}.dspark_components"
_UNQUANTIZED = "sglang.srt.layers.quantization.unquant.Unquantized"
_STATE = "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
_ARGS = "sglang.srt.server_args.ServerArgs"

HOOKS = (
    Seam(f"{_ARGS}.add_cli_args", HookType.AFTER, handlers.add_cli_args, "parser", "the --dspark-* flags"),
    Seam(
        f"{_ARGS}.from_cli_args", HookType.AFTER, handlers.from_cli_args, "cls, args",
        "keep the parsed options on the server arguments; refuse a port in use before anything is loaded",
    ),
    Seam(
        f"{_ARGS}.resolve_once", HookType.BEFORE, handlers.before_resolution, "self",
        "refuse an unusable drafter before anything is loaded; defaults for a machine without accelerator",
    ),
    Seam(
        f"{_DSPARK}.dspark_config.DSparkDraftConfig.require_markov", HookType.REPLACE, handlers.require_markov, "self",
        "DFlash has no Markov head",
    ),
    Seam(
        "sglang.srt.models.dspark.build_markov_head", HookType.AROUND, handlers.build_markov_head, "config",
        "DFlash has no Markov head",
    ),
    Seam(
        "sglang.srt.model_executor.model_runner_components.attention_backend_setup.configure_aux_hidden_state_capture",
        HookType.AROUND, handlers.configure_capture,
        "model, eagle_use_aux_hidden_state, eagle_aux_hidden_state_layer_ids, dflash_use_aux_hidden_state, "
        "dflash_target_layer_ids, is_dspark",
        "targets that can show their layers although SGLang has no method for it",
    ),
    Seam(
        f"{_SPEC}.spec_info.SpeculativeAlgorithm.create_worker", HookType.AROUND, handlers.create_worker,
        "self, server_args",
        "serve our worker; the enum member stays, dozens of call sites test for it",
    ),
    Seam(
        f"{_STATE}.get_internal_state", HookType.AFTER, handlers.get_internal_state, "self, recv_req",
        "proof of being active, timings and accepted length in /server_info",
    ),
    Seam(
        f"{_STATE}._update_handlers", HookType.AFTER, handlers.update_handlers, "self",
        "switch the policy of a running server",
    ),
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.__init__", HookType.AFTER, handlers.scheduler_is_ready,
        "self, server_args, port_args",
        "profile the engine when it is complete and before it takes requests",
    ),
    Seam(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server", HookType.BEFORE, handlers.add_routes,
        "server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, subprocess_watchdog, "
        "execute_warmup_func, launch_callback",
        "the /dspark routes",
    ),
    Seam(
        "sglang.srt.arg_groups.speculative_hook._handle_dspark", HookType.AROUND, handlers.handle_dspark,
        "server_args", "DSPARK is refused on CPU by its device name alone", cpu_only=True,
    ),
    Seam(
        "sglang.srt.arg_groups.model_hook.handle_model_specific_adjustments", HookType.AROUND, handlers.handle_model,
        "server_args", "Gemma 4 is refused on CPU by the name of its attention backend", cpu_only=True,
    ),
    Seam(
        "sglang.kernels.ops.speculative.reject_sampling.chain_speculative_sampling_triton", HookType.REPLACE,
        handlers.chain_speculative_sampling,
        "predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, "
        "retrive_next_sibling, uniform_samples, uniform_samples_for_final_sampling, target_probs, draft_probs, "
        "threshold_single, threshold_acc, deterministic, block_verification",
        "the rejection rule exists as a Triton kernel only", cpu_only=True,
    ),
    Seam(
        f"{_DSPARK}.dspark_verify._draft_probs", HookType.AROUND, handlers.draft_probs,
        "draft_block, vocab, device", "reject with the very distributions that were sampled from",
    ),
    Seam(
        f"{_DSPARK}.dspark_verify.verify_logits_adjustments_are_noop", HookType.AROUND, handlers.adjustments_are_noop,
        "sampling_info", "SGLang looks for penalties under a name that they no longer have",
    ),
    Seam(
        "sglang.srt.models.dspark.DSparkDraftMixin._build_fused_kv_write_bundle", HookType.REPLACE,
        handlers.no_fused_kv_write, "self, pool", "the fused write is a Triton kernel", cpu_only=True,
    ),
    Seam(
        f"{_UNQUANTIZED}LinearMethod.apply", HookType.AROUND, handlers.apply_linear, "self, layer, x, bias",
        "oneDNN repacks a plain bf16 weight at every call", cpu_only=True,
    ),
    Seam(
        f"{_UNQUANTIZED}LinearMethod.process_weights_after_loading", HookType.AFTER, handlers.forget_packed_weight,
        "self, layer", "packed weights follow the loaded ones", cpu_only=True,
    ),
    Seam(
        f"{_UNQUANTIZED}EmbeddingMethod.process_weights_after_loading", HookType.AFTER, handlers.forget_packed_weight,
        "self, layer", "the same for the head", cpu_only=True,
    ),
    Seam(
        "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head", HookType.AROUND,
        handlers.compute_lm_head, "self, hidden_states, lm_head, embedding_bias, out", "the same for the head",
        cpu_only=True,
    ),
)  # fmt: skip


def active_hooks() -> tuple[Seam, ...]:
    """The hooks of this process: those for CPU only where there is no accelerator and the plugin is not disabled."""
    return tuple(hook for hook in HOOKS if not hook.cpu_only or serves_on_cpu())


def serves_on_cpu() -> bool:
    """Whether this process runs models on CPU with our parts; --dspark-disable reaches spawned ones by variable."""
    return not has_accelerator() and not load_config({}, os.environ).disable


def check_signature(symbol: str, expected: str) -> None:
    """Raise EnvironmentMismatchError, naming `symbol`, when it is gone or takes other parameters than `expected`."""
    try:
        found = ", ".join(inspect.signature(inspect.unwrap(_raw(symbol))).parameters)
    except (AttributeError, ImportError) as error:
        found = f"nothing ({error})"
    if found != expected:
        raise EnvironmentMismatchError(
            f"{symbol} takes ({found})",
            expected=f"({expected})",
            fix="Install the SGLang that this release of dspark-serving supports.",
        )


def register() -> None:
    """Check the hooked symbols and hand the hooks to SGLang, which applies them when all plugins are loaded."""
    for hook in active_hooks():
        check_signature(hook.symbol, hook.signature)
    for hook in active_hooks():
        HookRegistry.register(hook.symbol, hook.handler, hook.kind)
    models.register()
    if serves_on_cpu():
        enable.register_backend()


def check_applied() -> None:
    """Raise EnvironmentMismatchError when SGLang failed to apply a hook (it only logs that), or a base has changed."""
    for hook in active_hooks():
        if not hasattr(_raw(hook.symbol), "__wrapped__"):
            raise EnvironmentMismatchError(
                f"the hook on {hook.symbol} was not applied",
                expected=f"it in place ({hook.why})",
                fix="Look for 'Failed to apply hooks' in the log; another plugin may own the symbol.",
            )
    for base in BASES:
        check_signature(base.symbol, base.signature)


def _raw(symbol: str) -> Any:
    """The function behind a dotted name, without binding."""
    owner_name, _, name = symbol.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    found = inspect.getattr_static(owner, name)
    return found.__func__ if isinstance(found, classmethod | staticmethod) else found
