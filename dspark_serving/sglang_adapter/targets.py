"""Which target models can show a drafter the outputs of their layers, and how SGLang is asked for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dspark_serving.errors import CheckpointError

# SGLang's own ways, tried in this order.
_NATIVE = ("set_dspark_layers_to_capture", "set_dflash_layers_to_capture")


def check_target(target_config: Mapping[str, Any], path: str) -> None:
    """Refuse a target whose model in SGLang cannot give the outputs of chosen layers.

    Raises:
        CheckpointError: names the architecture and those of the same kind that can.
    """
    from sglang.srt.models.registry import ModelRegistry

    found = [str(name) for name in target_config.get("architectures") or []]
    known = [(name, ModelRegistry.models[name]) for name in found if name in ModelRegistry.models]
    if any(name in _OURS or any(hasattr(model, method) for method in _NATIVE) for name, model in known):
        return
    raise CheckpointError(
        f"the target {path} ({', '.join(found) or 'no architecture'}) cannot show the outputs of its layers in SGLang, "
        "which the drafter needs",
        expected="a target such as Qwen2, Qwen3, Llama, Gemma3 or Gemma4 text, GPT-OSS, GLM-4 or DeepSeek-V3",
        fix="Serve it without --speculative-algorithm.",
    )


def capture_layers(model: Any, layer_ids: list[int]) -> bool:
    """Let a model of the table below hand out the outputs of decoder layers; False for all others."""
    way = _OURS.get(type(model).__name__)
    if way is None:
        return False
    way(model, layer_ids)
    return True


def _as_eagle3(model: Any, layer_ids: list[int]) -> None:
    """SGLang can for EAGLE3 what it lacks a method for here; layer l means the output of layer l in both."""
    model.set_eagle3_layers_to_capture(layer_ids)


def _from_residual_stream(model: Any, layer_ids: list[int]) -> None:
    """Watch the layers: SGLang's own capture for EAGLE3 forgets the residual, which these layers carry separately."""
    taken: list[Any] = []

    def keep(layer: Any, arguments: Any, output: Any) -> None:
        hidden, residual = output
        taken.append(hidden + residual)

    def hand_out(stack: Any, arguments: Any, output: Any) -> tuple[Any, list[Any]]:
        features = taken.copy()
        taken.clear()
        return output, features

    for index in layer_ids:
        model.model.layers[index].register_forward_hook(keep)
    model.model.register_forward_hook(hand_out)
    model.capture_aux_hidden_states = True


_OURS: dict[str, Callable[[Any, list[int]], None]] = {
    "Qwen2ForCausalLM": _as_eagle3,
    "Gemma3ForCausalLM": _from_residual_stream,
}
