"""One description of a drafter, and the reader of DeepSpec's checkpoint format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_serving.errors import CheckpointError

ARCHITECTURES = ("Qwen3DSparkModel", "DsparkServingBlockDrafter")
MARKOV_TYPES = ("vanilla", "gated", "rnn")


@dataclass(frozen=True)
class DrafterSpec:
    """A DSpark drafter as its config.json (and draft_vocab.json) describe it; checked against itself, not the target.

    Field names are DeepSpec's, except for `gamma` (block_size) and `layers` (num_hidden_layers).
    """

    path: Path
    architecture: str
    hidden_size: int
    intermediate_size: int
    head_dim: int
    num_attention_heads: int
    num_key_value_heads: int
    attention_bias: bool
    layers: int
    num_target_layers: int
    """Decoder layers of the target that it was trained for."""
    gamma: int
    """Drafted tokens a round; the anchor's row predicts the first."""
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    """Layer l means the output of decoder layer l."""
    vocab_size: int
    markov_rank: int
    markov_head_type: str
    has_confidence: bool
    confidence_with_markov: bool
    draft_token_ids: tuple[int, ...] | None
    """Ids that the drafter may propose, ascending; None for the whole vocabulary."""
    family: str = "dspark"
    layer_kind: str = "qwen3"
    anchor_predicts: bool = True
    own_head: bool = False
    own_embedding: bool = False


def read_spec(path: str | Path) -> DrafterSpec:
    """Read the description of the drafter in directory `path`; the weights are left to `check_weights`.

    Raises:
        CheckpointError: no such directory, no or a damaged config.json, an unknown architecture or Markov head, or a
            field that is missing or contradicts another; names the field.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise CheckpointError(
            f"the drafter directory {directory} does not exist",
            expected="a directory with config.json and model.safetensors",
            fix="Check --speculative-draft-model-path.",
        )
    fields = _Fields(directory / "config.json")
    architecture = _architecture(fields)
    rank = fields.integer("markov_rank", low=0)
    head_type = str(fields.get("markov_head_type", "vanilla")).lower()
    if head_type not in MARKOV_TYPES:
        raise fields.error(f"markov_head_type is {head_type!r}", f"one of {', '.join(MARKOV_TYPES)}")
    vocab_size = fields.integer("vocab_size", low=1)
    spec = DrafterSpec(
        path=directory,
        architecture=architecture,
        hidden_size=fields.integer("hidden_size", low=1),
        intermediate_size=fields.integer("intermediate_size", low=1),
        head_dim=fields.integer("head_dim", low=1),
        num_attention_heads=fields.integer("num_attention_heads", low=1),
        num_key_value_heads=fields.integer("num_key_value_heads", low=1),
        attention_bias=bool(fields.get("attention_bias", False)),
        layers=fields.integer("num_hidden_layers", low=1),
        num_target_layers=fields.integer("num_target_layers", low=1),
        gamma=fields.integer("block_size", low=1),
        mask_token_id=fields.integer("mask_token_id", low=0),
        target_layer_ids=fields.integers("target_layer_ids"),
        vocab_size=vocab_size,
        markov_rank=rank,
        markov_head_type=head_type,
        has_confidence=bool(fields.get("enable_confidence_head", False)),
        confidence_with_markov=bool(fields.get("confidence_head_with_markov", True)),
        draft_token_ids=_draft_vocabulary(directory, fields, vocab_size),
        family=str(fields.get("family", "dspark")),
        layer_kind=str(fields.get("layer_kind", "qwen3")),
        anchor_predicts=bool(fields.get("sample_from_anchor", True)),
        own_head=bool(fields.get("own_head", False)),
        own_embedding=bool(fields.get("own_embedding", False)),
    )
    _check_consistency(spec, fields)
    return spec


class _Fields:
    """A config.json whose fields are read with errors that name them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values = read_json_object(path, "a drafter's config.json in DeepSpec's format")

    def get(self, name: str, default: Any) -> Any:
        return self._values.get(name, default)

    def integer(self, name: str, *, low: int) -> int:
        value = self._values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.error(f"{name} is {value!r}", f"an integer of at least {low}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        value = self._values.get(name)
        if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
            raise self.error(f"{name} is {value!r}", "a list of integers")
        return tuple(value)

    def error(self, problem: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {problem}", expected=expected, fix="Use a drafter checkpoint in DeepSpec's format."
        )


def read_json_object(path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds something else; `expected` says what it should be.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", expected=expected, fix="Check the checkpoint's path.")
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error})", expected=expected, fix="Copy the checkpoint again."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} holds a {type(found).__name__}", expected=expected, fix="Copy the checkpoint again."
        )
    return found


def _architecture(fields: _Fields) -> str:
    found = fields.get("architectures", None)
    if not isinstance(found, list) or len(found) != 1 or found[0] not in ARCHITECTURES:
        raise fields.error(f"architectures is {found!r}", f"a drafter of a known kind ({', '.join(ARCHITECTURES)})")
    return str(found[0])


def _draft_vocabulary(directory: Path, fields: _Fields, vocab_size: int) -> tuple[int, ...] | None:
    path = directory / "draft_vocab.json"
    size = fields.get("draft_vocab_size", None)
    if size is None:
        if path.exists():
            raise fields.error("draft_vocab_size is missing beside draft_vocab.json", "both of them, or neither")
        return None
    ids = read_json_object(path, 'an object {"token_ids": [...]}').get("token_ids")
    if not isinstance(ids, list) or not _ascending_ids(ids, vocab_size) or len(ids) != size:
        raise CheckpointError(
            f"{path}: token_ids is not a list of {size} different ids",
            expected=f"draft_vocab_size ({size}) ascending ids below vocab_size ({vocab_size})",
            fix="Export the drafter again.",
        )
    return tuple(ids)


def _ascending_ids(ids: list[Any], limit: int) -> bool:
    """Whether `ids` is a non-empty, strictly ascending list of integers from 0 to limit - 1."""
    if not ids or not all(type(item) is int for item in ids):
        return False
    return sorted(set(ids)) == ids and ids[0] >= 0 and ids[-1] < limit


def _check_consistency(spec: DrafterSpec, fields: _Fields) -> None:
    if spec.num_attention_heads % spec.num_key_value_heads:
        raise fields.error(
            f"num_attention_heads ({spec.num_attention_heads}) is no multiple of num_key_value_heads",
            f"a multiple of {spec.num_key_value_heads}",
        )
    if spec.mask_token_id >= spec.vocab_size:
        raise fields.error(f"mask_token_id is {spec.mask_token_id}", f"an id below vocab_size ({spec.vocab_size})")
    ids, last = spec.target_layer_ids, spec.num_target_layers - 1
    if not _ascending_ids(list(ids), last):
        raise fields.error(
            f"target_layer_ids is {list(ids)}",
            f"ascending ids from 0 to {last - 1} (num_target_layers is {last + 1}; the last layer's output is not "
            "available before the final norm)",
        )
