"""What happens to SGLang's server arguments before it resolves them: refusals, and defaults of a CPU machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspark_serving.assets.store import cache_root
from dspark_serving.config import ServingConfig, flag, variable
from dspark_serving.drafters import DrafterSpec, check_fit, check_target_files, check_weights, make_view, read_spec
from dspark_serving.drafters.spec import read_json_object
from dspark_serving.errors import CheckpointError, EnvironmentMismatchError, OptionError
from dspark_serving.recording.file import check_writable
from dspark_serving.scheduler import survival_map
from dspark_serving.scheduler.survival_map import SurvivalMap
from dspark_serving.sglang_adapter.cpu.standins import has_accelerator
from dspark_serving.sglang_adapter.plugin import ALGORITHMS
from dspark_serving.sglang_adapter.targets import check_target

logger = logging.getLogger(__name__)

# What an unset argument becomes on a machine without accelerator, and why.
CPU_DEFAULTS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",  # the backend that cpu/attention.py stands in for
    "max_running_requests": 16,  # beyond that a CPU gains nothing
    "max_total_tokens": 16384,  # SGLang would reserve most of the memory
    "enable_multimodal": False,  # image processors need torchvision, which has no place beside a CPU's torch
}
RAGGED_MODE = "SGLANG_RAGGED_VERIFY_MODE"
# What SGLang's own implementation refuses on a machine without accelerator.
_NEED_ACCELERATOR = ("dspark", "dflash")


def prepare(server_args: Any, config: ServingConfig) -> None:
    """Refuse what cannot be served and fill in defaults; runs once, in the launching process.

    Raises:
        CheckpointError: the drafter is missing, damaged, or does not fit the target.
        DataError: the drafter's survival map cannot be used.
        OptionError: no drafter is given, it is of another family than the algorithm, an option is for a confidence
            head that it lacks or for another block size, a way to deploy is not supported, or recordings cannot be
            written.
    """
    name = (server_args.speculative_algorithm or "").upper()
    wanted = next((family for family, algorithm in ALGORITHMS.items() if algorithm == name), None)
    cpu = not has_accelerator()
    if cpu:
        _fill_cpu_defaults(server_args)
    if config.disable:
        os.environ[variable("disable")] = "1"  # for the processes that SGLang spawns, which hook nothing then
    if wanted and config.disable:
        if cpu and wanted in _NEED_ACCELERATOR:
            logger.warning("%s: SGLang's own %s cannot run here; serving without speculation", flag("disable"), name)
            _declare(server_args, speculative_algorithm=None, speculative_draft_model_path=None)
        return
    if wanted:
        _check_deployment(server_args, cpu=cpu)
        _check_recording(config)
        spec = check_drafter(server_args.model_path, server_args.speculative_draft_model_path, wanted)
        _check_estimates(server_args, spec)
        _check_block_size(server_args, spec)
        os.environ.setdefault(RAGGED_MODE, "compact")
        view = make_view(spec, cache_root())
        # All families run in SGLang's DSPARK worker: only that has ragged verification.
        _declare(server_args, speculative_algorithm=ALGORITHMS["dspark"], speculative_draft_model_path=str(view))


def check_drafter(model_path: str, draft_path: str | None, family: str) -> DrafterSpec:
    """Read the drafter completely and check that it is of the family that was asked for and fits the target.

    Returns:
        Its description, completed with what the format leaves to the target.

    Raises:
        OptionError: no drafter path, or one of another family.
        CheckpointError: drafter or target cannot be used.
    """
    if not draft_path:
        raise OptionError(
            "no drafter is given",
            expected=f"--speculative-draft-model-path with a {family} drafter made for this target",
            fix="Add it, or drop --speculative-algorithm.",
        )
    spec = read_spec(local_directory(draft_path, "drafter"))
    if spec.family != family:
        raise OptionError(
            f"--speculative-algorithm {family} with the drafter {spec.path}, which is a {spec.family} drafter",
            expected=f"--speculative-algorithm {spec.family} for this drafter",
            fix="Change the algorithm, or give another drafter.",
        )
    target, config = local_directory(model_path, "target model"), target_config(model_path)
    spec = check_fit(spec, config, target)
    check_target(config, model_path)
    check_weights(spec)
    check_target_files(target)
    return spec


def survival_map_of(spec: DrafterSpec) -> SurvivalMap | None:
    """What judges the drafts from their distributions; None where the confidence head does."""
    return survival_map.survival_map_beside(spec.path, spec.gamma, has_head=spec.has_confidence)


def _check_deployment(server_args: Any, *, cpu: bool) -> None:
    """Refuse what the plan of a round does not reach: it is made once for a batch that all ranks share."""
    found: dict[str, tuple[Any, Any]] = {
        "--disaggregation-mode": (server_args.disaggregation_mode, "null"),
        "--enable-dp-attention": (server_args.enable_dp_attention, False),
        "--pp-size": (server_args.pp_size, 1),
    }
    if cpu:
        found["--tp-size"] = (server_args.tp_size, 1)  # the draft chain reads the whole head
    for name, (given, supported) in found.items():
        if given != supported:
            raise OptionError(
                f"{name} is {given}{' without an accelerator' if name == '--tp-size' else ''}",
                expected=f"{supported}: dspark-serving does not serve this way",
                fix=f"Drop {name}, or serve as SGLang does with {flag('disable')}.",
            )


def _check_recording(config: ServingConfig) -> None:
    if config.recording is None:
        return
    try:
        check_writable(config.recording)
    except OSError as error:
        raise OptionError(
            f"{flag('recording')} {config.recording}: {error.strerror}",
            expected="a directory that the server may write to",
            fix="Name another one, or change its rights.",
        ) from error


def _check_block_size(server_args: Any, spec: DrafterSpec) -> None:
    given = server_args.speculative_dspark_block_size
    if given not in (None, spec.gamma):
        raise OptionError(
            f"--speculative-dspark-block-size is {given}, {spec.path} drafts {spec.gamma} tokens",
            expected="the drafter's own block size; fewer are verified where that pays",
            fix="Drop the option.",
        )


def _check_estimates(server_args: Any, spec: DrafterSpec) -> None:
    estimated = survival_map_of(spec) is not None
    if estimated and server_args.speculative_dspark_confidence_sts_path:
        why = f"whose drafts {survival_map.FILE_NAME} judges" if spec.has_confidence else "which has no confidence head"
        raise OptionError(
            f"--speculative-dspark-confidence-sts-path with {spec.path}, {why}",
            expected=f"{flag('calibration')}, which applies to estimated confidences too",
            fix="Fit it with `dspark calibrate` on recordings of this drafter.",
        )


def target_config(model_path: str) -> dict[str, Any]:
    """The target's config.json, of a directory or of the hub's cache.

    Raises:
        CheckpointError: there is none.
    """
    path = local_directory(model_path, "target model") / "config.json"
    return read_json_object(path, "the target's config.json, as transformers writes it")


def local_directory(name: str, role: str) -> Path:
    """`name` as a directory: itself, or the local snapshot of a repository on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = f"; the hub answered: {str(error).splitlines()[0]}"
    else:
        reason = ""
    raise CheckpointError(
        f"the {role} directory {name} does not exist{reason}",
        expected="an existing checkpoint directory (or a repository on the hub)",
        fix=f"Check the path of the {role}.",
    )


def check_port(host: str, port: int) -> None:
    """Raise EnvironmentMismatchError when the server could not listen there; SGLang would find out after loading."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EnvironmentMismatchError(
                f"cannot listen on {host}:{port} ({error.strerror})",
                expected="a free port",
                fix="Stop the other server, or choose another --port.",
            ) from error


def resolve_as_cuda(original: Callable[[Any], None], server_args: Any) -> None:
    """Run SGLang's resolution of DSPARK under the device name that it asks for, then put the real one back."""
    _resolve_under(original, server_args, device="cuda")
    # The overlapped loop needs device streams.
    _declare(server_args, disable_overlap_schedule=True)


def resolve_as_triton(original: Callable[[Any], None], server_args: Any) -> None:
    """Run SGLang's resolution of the model's particulars; Gemma 4's under an attention backend that it asks for."""
    from sglang.srt.arg_groups.overrides import model_config_of

    if model_config_of(server_args).hf_config.architectures[0].startswith("Gemma4"):
        _resolve_under(original, server_args, attention_backend="triton")
    else:
        original(server_args)


def _resolve_under(original: Callable[[Any], None], server_args: Any, **shown: Any) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    real = {name: getattr(resolving_view(server_args), name) for name in shown}
    _declare(server_args, **shown)
    try:
        original(server_args)
    finally:
        _declare(server_args, **real)


def _fill_cpu_defaults(server_args: Any) -> None:
    filled = {name: value for name, value in CPU_DEFAULTS.items() if getattr(server_args, name) is None}
    # SGLang would turn a float32 checkpoint into float16, which a CPU has no fast arithmetic for.
    local_config = Path(server_args.model_path).expanduser() / "config.json"
    if server_args.dtype == "auto" and local_config.is_file():
        config = read_json_object(local_config, "a checkpoint's config.json")
        if config.get("dtype", config.get("torch_dtype")) == "float32":
            filled["dtype"] = "float32"
    filled["sleep_on_idle"] = True  # an idle scheduler would otherwise keep a core busy
    filled["disable_hybrid_swa_memory"] = True  # our backend reads one table of cache rows for all layers
    _declare(server_args, **filled)
    logger.info("no accelerator here: %s", ", ".join(f"{name}={value}" for name, value in filled.items()))


def _declare(server_args: Any, **fields: Any) -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, "dspark-serving", **fields)
