"""Kinds of drafters and checkpoints that are known but not served, each with its reason."""

from __future__ import annotations

from typing import Any

from dspark_serving.drafters.fields import Fields
from dspark_serving.drafters.readers.reader import architecture
from dspark_serving.errors import CheckpointError

_TREE = "EAGLE-1/2 drafts without the target's inner layers; dspark, dflash and eagle3 drafters are served"
_MEDUSA = "Medusa heads propose a tree from one hidden state; dspark, dflash and eagle3 drafters are served"
_PEAGLE = "P-EAGLE drafts in parallel with its own masks; dspark, dflash and eagle3 drafters are served"
_DFLASH2 = "DFlash 2 adds convolutions and a candidate selector; DFlash drafters are served"
_MTP = "multi-token-prediction layers belong to their target; serve them with SGLang's own EAGLE"
_DOMINO = "Domino adds a recurrent correction; DFlash and DSpark drafters are served"

# By architecture, by speculators_model_type, and by projector_type.
KINDS: dict[str, str] = {
    "LlamaForCausalLMEagle": _TREE,
    "EagleForCausalLM": _TREE,
    "EagleSpeculator": _TREE,
    "EAGLEModel": _TREE,
    "Qwen2ForCausalLMEagle": _TREE,
    "eagle": _TREE,
    "MedusaModel": _MEDUSA,
    "MedusaLMHeadModel": _MEDUSA,
    "medusa": _MEDUSA,
    "hydra": "Hydra heads propose a tree from one hidden state; dspark, dflash and eagle3 drafters are served",
    "PEagleDraftModel": _PEAGLE,
    "PEagleSpeculator": _PEAGLE,
    "PeagleLlamaForCausalLM": _PEAGLE,
    "PeagleQwen3ForCausalLM": _PEAGLE,
    "peagle": _PEAGLE,
    "DFlash2DraftModel": _DFLASH2,
    "DFlash2BeamDraftModel": _DFLASH2,
    "dflash2": _DFLASH2,
    "mtp": _MTP,
    "fast_mtp": _MTP,
    "domino": _DOMINO,
    "mlp": "MLP speculators draft without attention; dspark, dflash and eagle3 drafters are served",
    "MLPSpeculatorPreTrainedModel": "MLP speculators draft without attention; dspark, dflash and eagle3 are served",
    "Eagle3DeepseekV2ForCausalLM": "its attention is MLA; drafters with ordinary attention are served",
    "DeepseekV4ForCausalLMDSpark": "its attention is DeepSeek V4's; drafters with ordinary attention are served",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_config")
_TARGET_WITH_DRAFTER = ("dspark_block_size", "dspark_target_layer_ids")


def refuse_unserved(fields: Fields) -> None:
    """Raise CheckpointError when config.json is of a known kind that is not served; says which, and why."""
    reason = _reason(fields.over(*_nested(fields)))
    if reason is not None:
        raise CheckpointError(
            f"{fields.path}: this drafter cannot be served: {reason}",
            expected="a dspark, dflash or eagle3 drafter with ordinary layers in 16 or 32 bit",
            fix="Use such a drafter for this target, or serve without speculation.",
        )


def _nested(fields: Fields) -> list[str]:
    parts = ("dflash_config", "dspark_config", "eagle_config", "transformer_layer_config")
    return [name for name in parts if isinstance(fields.get(name), dict)]


def _reason(fields: Fields) -> str | None:
    for name in (architecture(fields), fields.get("speculators_model_type"), fields.get("projector_type")):
        if isinstance(name, str) and name in KINDS:
            return f"{name}: {KINDS[name]}"
    if fields.get("model_type") in ("eagle", "medusa"):
        return f"model_type {fields.get('model_type')}: {KINDS[fields.get('model_type')]}"
    if "medusa_num_heads" in fields:
        return f"medusa_num_heads: {_MEDUSA}"
    for name in ("quantization_config", "compression_config"):
        if fields.get(name):
            return f"its weights are quantised ({name}: {_method(fields.get(name))})"
    for name in _EXPERTS:
        if fields.get(name):
            return f"its layers are mixtures of experts ({name})"
    if fields.get("enable_moe_block") is True:
        return "its layers are mixtures of experts (enable_moe_block)"
    modes = {str(fields.get("attention_mode", "gqa")), *_texts(fields.get("attention_modes"))} - {"gqa", "mha"}
    if modes:
        return f"its attention is {', '.join(sorted(modes))}, not grouped-query attention"
    if any(name in fields for name in _TARGET_WITH_DRAFTER):
        return "it is a whole model with a drafter inside; drafters in a directory of their own are served"
    return None


def _method(config: Any) -> str:
    method = (config.get("quant_method") or config.get("quant_algo")) if isinstance(config, dict) else None
    return str(method or "given")


def _texts(modes: Any) -> list[str]:
    return [str(mode) for mode in modes] if isinstance(modes, list) else []
