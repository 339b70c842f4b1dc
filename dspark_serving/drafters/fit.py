"""Whether a drafter belongs to a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_serving.drafters.spec import DrafterSpec
from dspark_serving.errors import CheckpointError

# (field of the spec, field of the target's config.json, in words)
_EQUAL = (
    ("hidden_size", "hidden_size", "hidden size"),
    ("vocab_size", "vocab_size", "vocabulary size"),
    ("num_target_layers", "num_hidden_layers", "number of target layers"),
)


def check_fit(spec: DrafterSpec, target_config: Mapping[str, Any]) -> None:
    """Check the drafter against the target's config.json (its `text_config` for a multimodal target).

    Raises:
        CheckpointError: hidden size, vocabulary size or number of layers differ; names both values.
    """
    text_config = target_config.get("text_config") or target_config
    for ours, theirs, words in _EQUAL:
        found, expected = getattr(spec, ours), text_config.get(theirs)
        if expected is not None and found != expected:
            raise CheckpointError(
                f"the drafter {spec.path} was made for another target: its {words} is {found}",
                expected=f"{expected}, as in the target",
                fix="Use the drafter that was trained for this target.",
            )
