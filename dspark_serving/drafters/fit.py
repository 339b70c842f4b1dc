"""Whether a drafter belongs to a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dspark_serving.drafters.registry import check_layer_ids
from dspark_serving.drafters.spec import DEFAULT_FEATURES, DrafterSpec, read_json_object
from dspark_serving.errors import CheckpointError

# (field of the spec, field of the target's config.json, in words); an unknown value of either is no problem
_EQUAL = (
    ("target_hidden_size", "hidden_size", "hidden size"),
    ("vocab_size", "vocab_size", "vocabulary size"),
    ("num_target_layers", "num_hidden_layers", "number of target layers"),
)


def check_fit(spec: DrafterSpec, target_config: Mapping[str, Any], target: Path | None = None) -> DrafterSpec:
    """Check the drafter against the target, and complete what its format leaves to the target.

    Args:
        target_config: the target's config.json (its `text_config` counts for a multimodal target).
        target: its directory, to compare the tokenizers where both have one.

    Returns:
        The spec with `num_target_layers` and `target_layer_ids` filled in.

    Raises:
        CheckpointError: hidden size, vocabulary size, number of layers, feature layers or special tokens differ; names
            every difference with both values.
    """
    problems = fit_problems(spec, target_config, target)
    if problems:
        raise CheckpointError(
            f"the drafter {spec.path} was made for another target: {'; '.join(problems)}",
            expected="a drafter that was trained for this target",
            fix="Use that one.",
        )
    completed = complete(spec, target_config)
    check_layer_ids(completed)
    return completed


def fit_problems(spec: DrafterSpec, target_config: Mapping[str, Any], target: Path | None = None) -> list[str]:
    """Every way in which the drafter does not belong to the target; arguments as for `check_fit`."""
    text_config = target_config.get("text_config") or target_config
    problems = []
    for ours, theirs, words in _EQUAL:
        found, expected = getattr(spec, ours), text_config.get(theirs)
        if expected is not None and found is not None and found != expected:
            problems.append(f"its {words} is {found}, the target's {expected}")
    depth = text_config.get("num_hidden_layers")
    if isinstance(depth, int) and not spec.target_layer_ids and len(_default_layers(depth)) < DEFAULT_FEATURES:
        problems.append(f"it reads EAGLE-3's default layers, for which the target's {depth} layers are too few")
    if isinstance(depth, int) and spec.num_target_layers is None:
        outside = [layer for layer in spec.target_layer_ids if layer >= depth - 1]
        if outside:
            problems.append(f"it reads the layers {outside}, the target has {depth} (the last one cannot be read)")
    problems += _special_token_problems(spec, text_config, target_config)
    return problems + (_tokenizer_problems(spec.path, target) if target is not None else [])


def complete(spec: DrafterSpec, target_config: Mapping[str, Any]) -> DrafterSpec:
    """The spec with what its format leaves to the target's depth; unchanged when the target does not say it either."""
    text_config = target_config.get("text_config") or target_config
    depth = spec.num_target_layers or text_config.get("num_hidden_layers")
    if not isinstance(depth, int):
        return spec
    return replace(spec, num_target_layers=depth, target_layer_ids=spec.target_layer_ids or _default_layers(depth))


def _default_layers(depth: int) -> tuple[int, ...]:
    """EAGLE-3's default feature layers of a target.

    SGLang and vLLM read the inputs of layers 2, n // 2 and n - 3, which are the outputs of the layers before them.
    Source: sglang 0.5.23, srt/models/llama.py, set_eagle3_layers_to_capture.
    """
    return tuple(sorted({1, depth // 2 - 1, depth - 4}))


def _special_token_problems(
    spec: DrafterSpec, text_config: Mapping[str, Any], target_config: Mapping[str, Any]
) -> list[str]:
    found = text_config.get("eos_token_id", target_config.get("eos_token_id"))
    theirs = set(found if isinstance(found, list) else [] if found is None else [found])
    ours = set(spec.special_token_ids)
    if not ours or not theirs or ours & theirs:
        return []
    return [f"its texts end with the tokens {sorted(ours)}, the target's with {sorted(theirs)}"]


def _tokenizer_problems(drafter: Path, target: Path) -> list[str]:
    """The first special token whose id means another text for the target."""
    ours, theirs = _added_tokens(drafter), _added_tokens(target)
    for token_id in sorted(ours.keys() & theirs.keys()):
        if ours[token_id] != theirs[token_id]:
            return [f"its tokenizer calls token {token_id} {ours[token_id]!r}, the target's {theirs[token_id]!r}"]
    return []


def _added_tokens(directory: Path) -> dict[int, str]:
    path = directory / "tokenizer.json"
    if not path.is_file():
        return {}
    added = read_json_object(path, "a tokenizer as the tokenizers library writes it").get("added_tokens") or []
    return {token["id"]: token["content"] for token in added if isinstance(token, dict) and "id" in token}
