"""One description of a drafter, whatever format it was published in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dspark_serving.errors import CheckpointError

Family = Literal["dspark", "dflash", "eagle3"]
LayerKind = Literal["qwen3", "llama", "gemma4"]

MARKOV_TYPES = ("vanilla", "gated", "rnn")
# EAGLE-3 drafters whose config names no feature layers take an early, a middle and a late one.
DEFAULT_FEATURES = 3


@dataclass(frozen=True)
class DrafterSpec:
    """A drafter as its files describe it; checked against itself, not the target.

    Field names are DeepSpec's, except for `gamma` (block_size) and `layers` (num_hidden_layers).
    """

    path: Path
    format: str
    """The reader that knows its weight names: a key of `registry.READERS`."""
    family: Family
    architecture: str
    """What its config.json calls it."""
    layer_kind: LayerKind
    hidden_size: int
    intermediate_size: int
    head_dim: int
    num_attention_heads: int
    num_key_value_heads: int
    attention_bias: bool
    qk_norm: bool
    layers: int
    hidden_act: str
    rms_norm_eps: float
    rope: Mapping[str, Any]
    """Rotary settings as transformers writes them: rope_type, rope_theta and what the type needs."""
    max_position_embeddings: int
    layer_types: tuple[str, ...]
    """Attention of each layer: full_attention or sliding_attention."""
    sliding_window: int | None
    """Positions that a row of a sliding_attention layer sees to its left, its own included."""
    is_causal: bool | None
    """Whether the rows of a block see only the rows before them; None: in sliding_attention layers only."""
    dtype: str
    vocab_size: int
    """Of the target's tokenizer."""
    draft_token_ids: tuple[int, ...] | None
    """Ids that the drafter may propose, ascending; None for the whole vocabulary."""
    num_target_layers: int | None
    """Decoder layers of the target that it was trained for; None when the format does not say, until `check_fit`."""
    target_hidden_size: int
    target_layer_ids: tuple[int, ...]
    """Layer l means the output of decoder layer l; empty for EAGLE-3's default layers, until `check_fit`."""
    gamma: int
    """Drafted tokens a round."""
    anchor_predicts: bool
    """Whether the anchor's row predicts the first token (a block has gamma rows), or masks do (gamma + 1 rows)."""
    mask_token_id: int | None
    """None for EAGLE-3, which drafts token by token."""
    markov_rank: int
    """0: no Markov head."""
    markov_head_type: str
    has_confidence: bool
    confidence_with_markov: bool
    own_head: bool
    """Whether it brings its own output head: [draft vocabulary, hidden_size] rows, as has its markov_w2."""
    own_embedding: bool
    norm_before_residual: bool
    """EAGLE-3: whether the residual is taken after `hidden_norm`."""
    attention_k_eq_v: bool
    """Gemma 4: values are the projected keys; there is no v_proj."""
    embed_scale: float
    """What the target's embedding is multiplied with before it enters the drafter."""
    final_logit_softcapping: float | None
    special_token_ids: tuple[int, ...]
    """Ids that end a text for its target, where the format copies them from the target; empty otherwise."""

    @property
    def num_features(self) -> int:
        """Target layers whose outputs are concatenated for `fc`."""
        return len(self.target_layer_ids) or DEFAULT_FEATURES

    @property
    def block_rows(self) -> int:
        """Rows of a block: the anchor, and masks."""
        return self.gamma if self.anchor_predicts else self.gamma + 1

    @property
    def head_rows(self) -> int:
        """Rows of its own output head and of markov_w2: the draft vocabulary with an own head, else the target's."""
        if self.own_head and self.draft_token_ids is not None:
            return len(self.draft_token_ids)
        return self.vocab_size


def read_json_object(path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds something else; `expected` says what it should be.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", expected=expected, fix="Check the checkpoint's path.")
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error})", expected=expected, fix="Copy the checkpoint again."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} holds a {type(found).__name__}", expected=expected, fix="Copy the checkpoint again."
        )
    return found


def ascending_ids(ids: list[Any], limit: int) -> bool:
    """Whether `ids` is a non-empty, strictly ascending list of integers from 0 to limit - 1."""
    if not ids or not all(type(item) is int for item in ids):
        return False
    return sorted(set(ids)) == ids and ids[0] >= 0 and ids[-1] < limit
