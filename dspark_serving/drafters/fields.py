"""Fields of a config.json, read with errors that name them."""

from __future__ import annotations

import math
from collections.abc import ItemsView, Mapping
from pathlib import Path
from typing import Any

from dspark_serving.drafters.spec import MARKOV_TYPES, read_json_object
from dspark_serving.errors import CheckpointError

# More layers than any target has: a damaged config must not cost minutes.
MAX_LAYERS = 1024


class Fields:
    """The values of a config.json, or of a part of it.

    Args:
        path: the file, for messages.
        values: its fields; None as a value counts as absent.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = {name: value for name, value in values.items() if value is not None}

    @classmethod
    def of(cls, directory: Path) -> Fields:
        """The config.json of a drafter's directory."""
        path = directory / "config.json"
        return cls(path, read_json_object(path, "a drafter's config.json"))

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)

    def items(self) -> ItemsView[str, Any]:
        return self._values.items()

    def part(self, name: str) -> Fields:
        """The object under `name`; empty when it is absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.error(f"{name} is {value!r}", "an object")
        return Fields(self.path, value)

    def over(self, *parts: str) -> Fields:
        """These fields, overlaid with those that stand in the objects `parts`."""
        merged = dict(self._values)
        for name in parts:
            merged |= self.part(name)._values
        return Fields(self.path, merged)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Fields:
        """These fields, with `defaults` where one is absent."""
        return Fields(self.path, {**defaults, **self._values})

    def integer(self, name: str, *, low: int, high: int | None = None, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            limits = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
            raise self.error(f"{name} is {value!r}", limits)
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        value = self.get(name)
        if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
            raise self.error(f"{name} is {value!r}", "a list of integers")
        return tuple(value)

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(f"{name} is {value!r}", "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{name} is {value!r}", "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.error(f"{name} is {value!r}", "a text")
        return value

    def error(self, problem: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {problem}",
            expected=expected,
            fix="Use a drafter whose config.json is complete and as its format asks.",
        )


def layer_fields(fields: Fields, *, chain: bool) -> dict[str, Any]:
    """The fields of DrafterSpec that every format takes from an ordinary transformers config.

    Args:
        chain: whether it is an Eagle3 drafter, whose layer attends to everything, whatever its target's layers do.
    """
    heads = fields.integer("num_attention_heads", low=1)
    hidden_size = fields.integer("hidden_size", low=1)
    layers = fields.integer("num_hidden_layers", low=1, high=MAX_LAYERS)
    if fields.flag("mlp_bias", False):
        raise fields.error("mlp_bias is true", "MLPs without bias")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size", low=1),
        "head_dim": fields.integer("head_dim", low=1, default=max(hidden_size // heads, 1)),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("num_key_value_heads", low=1, default=heads),
        "attention_bias": fields.flag("attention_bias", False),
        "layers": layers,
        "hidden_act": fields.text("hidden_act", "silu"),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope": rope_settings(fields),
        "max_position_embeddings": fields.integer("max_position_embeddings", low=1, default=32768),
        **_attention_fields(Fields(fields.path, {}) if chain else fields, layers),
        "dtype": fields.text("dtype", fields.text("torch_dtype", "bfloat16")),
        "vocab_size": fields.integer("vocab_size", low=1),
    }


def head_fields(fields: Fields) -> dict[str, Any]:
    """The Markov and confidence heads, by DeepSpec's names."""
    rank = fields.integer("markov_rank", low=0, default=0)
    head_type = fields.text("markov_head_type", "vanilla").lower()
    if head_type not in MARKOV_TYPES:
        raise fields.error(f"markov_head_type is {head_type!r}", f"one of {', '.join(MARKOV_TYPES)}")
    has_confidence = fields.flag("enable_confidence_head", False)
    with_markov = has_confidence and fields.flag("confidence_head_with_markov", True)
    if with_markov and not rank:
        raise fields.error("confidence_head_with_markov without a Markov head", "markov_rank of at least 1 beside it")
    return {
        "markov_rank": rank,
        "markov_head_type": head_type,
        "has_confidence": has_confidence,
        "confidence_with_markov": with_markov,
    }


def rope_settings(fields: Fields) -> dict[str, Any]:
    """Rotary settings in transformers' newer form (`rope_parameters`), from either form."""
    found = fields.part("rope_parameters") if "rope_parameters" in fields else fields.part("rope_scaling")
    settings = dict(found.items())
    settings["rope_type"] = settings.get("rope_type") or settings.pop("type", "default")
    settings.pop("type", None)
    settings["rope_theta"] = found.number("rope_theta", fields.number("rope_theta", 10000.0))
    return settings


def _attention_fields(fields: Fields, layers: int) -> dict[str, Any]:
    """What the rows of a block see: each layer's type, the window, and the direction within the block.

    Sources: z-lab/dflash, dflash/model.py; sglang 0.5.23, srt/models/dflash.py; vllm, vllm/model_executor/models/
    qwen3_dflash.py for what only `dflash_config` has (`use_swa`, `swa_window_size`, `causal`); read 2026-11.
    """
    kinds, nested = _layer_types(fields, layers), fields.part("dflash_config")
    says = [part.flag(name, False) for part, name in ((fields, "is_causal"), (nested, "causal")) if name in part]
    is_causal, window = says[0] if says else None, None
    everywhere = nested.flag("use_swa", False) and "sliding_attention" not in kinds
    if everywhere:  # whatever layer_types says, and with rows that see each other
        kinds, is_causal = ("sliding_attention",) * layers, bool(is_causal)
    if "sliding_attention" in kinds:
        if not everywhere and not fields.flag("use_sliding_window", False):
            raise fields.error(
                "layer_types names sliding_attention, use_sliding_window is not true",
                "use_sliding_window true beside such layers; transformers drops the window otherwise",
            )
        window = fields.over("dflash_config").integer(
            "swa_window_size" if "swa_window_size" in nested else "sliding_window", low=2
        )
    return {"layer_types": kinds, "sliding_window": window, "is_causal": is_causal}


def _layer_types(fields: Fields, layers: int) -> tuple[str, ...]:
    """layer_types; where it is absent as transformers fills it in, with windows from layer max_window_layers on."""
    full = layers
    if "max_window_layers" in fields and fields.flag("use_sliding_window", False):
        full = min(fields.integer("max_window_layers", low=0), layers)
    usual = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    kinds = fields.get("layer_types", usual)
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise fields.error(f"layer_types is {kinds!r}", f"full_attention or sliding_attention for {layers} layers")
    return tuple(kinds)
