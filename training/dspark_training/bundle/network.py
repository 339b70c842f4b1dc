"""Between a drafter's network in plain torch and its description: what a spec says of a network, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dspark_serving.drafters import DrafterSpec
from dspark_serving.drafters.readers import own
from dspark_serving.drafters.spec import Family
from dspark_serving.errors import CheckpointError
from dspark_training.data.vocab import DraftVocab
from dspark_training.models.backbone import BlockDrafter
from dspark_training.models.eagle3 import Eagle3Drafter
from dspark_training.models.layers import DrafterDims
from dspark_training.models.setup import Drafter
from dspark_training.target import Target


def describe_drafter(
    drafter: Drafter, target: Target, layer_ids: tuple[int, ...], vocab: DraftVocab, path: Path
) -> DrafterSpec:
    """The description of a trained drafter, in this project's own format.

    Args:
        layer_ids: decoder layers of the target that it reads (layer l is HF hidden_states[l + 1]).
        vocab: the tokens that it may propose.
        path: directory of its files.
    """
    dims, config = drafter.dims, target.config
    family = _family(drafter)
    stop = config.eos_token_id
    return DrafterSpec(
        path=path,
        format=own.FORMAT,
        family=family,
        architecture=own.EAGLE3_ARCHITECTURE if family == "eagle3" else own.BLOCK_ARCHITECTURE,
        layer_kind="qwen3",
        hidden_size=dims.hidden_size,
        intermediate_size=dims.intermediate_size,
        head_dim=dims.head_dim,
        num_attention_heads=dims.num_heads,
        num_key_value_heads=dims.num_kv_heads,
        attention_bias=False,
        qk_norm=True,
        layers=dims.num_layers,
        hidden_act="silu",
        rms_norm_eps=dims.rms_norm_eps,
        rope={"rope_type": "default", "rope_theta": dims.rope_theta},
        max_position_embeddings=config.max_position_embeddings,
        layer_types=("full_attention",) * dims.num_layers,
        sliding_window=None,
        is_causal=None,
        dtype="bfloat16",
        vocab_size=dims.vocab_size,
        draft_token_ids=tuple(vocab.ids_V.tolist()) if len(vocab.ids_V) < dims.vocab_size else None,
        num_target_layers=config.num_hidden_layers,
        target_hidden_size=config.hidden_size,
        target_layer_ids=tuple(layer_ids),
        gamma=dims.block_size,
        anchor_predicts=True,
        mask_token_id=None if family == "eagle3" else dims.mask_token_id,
        markov_rank=dims.markov_rank if family == "dspark" else 0,
        markov_head_type=dims.markov_head_type if family == "dspark" else "vanilla",
        has_confidence=family != "eagle3" and dims.confidence_head,
        confidence_with_markov=family == "dspark" and dims.confidence_head,
        own_head=False,
        own_embedding=False,
        norm_before_residual=False,
        attention_k_eq_v=False,
        embed_scale=target.embed_scale,
        final_logit_softcapping=getattr(config, "final_logit_softcapping", None),
        special_token_ids=tuple(sorted(stop if isinstance(stop, list) else [] if stop is None else [stop])),
    )


def network_for(spec: DrafterSpec) -> Drafter:
    """An untrained network of the drafter's shape.

    Raises:
        CheckpointError: the networks of this package cannot express it; names every reason.
    """
    reasons = _inexpressible(spec)
    if reasons:
        raise CheckpointError(
            f"the drafter {spec.path} cannot be run in plain torch: {'; '.join(reasons)}",
            expected="Qwen3's layers with full attention and the target's own embedding and output head",
            fix="Serve it, or evaluate it through a server.",
        )
    dims = DrafterDims(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_layers=spec.layers,
        num_heads=spec.num_attention_heads,
        num_kv_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.rms_norm_eps,
        rope_theta=spec.rope["rope_theta"],
        num_features=spec.num_features,
        vocab_size=spec.vocab_size,
        block_size=spec.gamma,
        mask_token_id=spec.mask_token_id or 0,
        markov_rank=spec.markov_rank,
        markov_head_type=spec.markov_head_type if spec.markov_rank else "none",
        confidence_head=spec.has_confidence,
    )
    return Eagle3Drafter(dims) if spec.family == "eagle3" else BlockDrafter(dims)


def target_tables(target: Target) -> dict[str, Tensor]:
    """The target's embedding (as stored, not scaled) and output head by the names of a drafter's copies, [V, D]."""
    embedding = target.model.get_input_embeddings().weight
    return {
        "embed_tokens.weight": embedding.detach().clone(),
        "lm_head.weight": target.lm_head_weight_VD.detach().clone(),
    }


def _family(drafter: Drafter) -> Family:
    if isinstance(drafter, Eagle3Drafter):
        return "eagle3"
    return "dflash" if drafter.markov_head is None else "dspark"


def _inexpressible(spec: DrafterSpec) -> list[str]:
    """What a drafter has that the networks of this package do not."""
    markov_blind = spec.has_confidence and spec.markov_rank > 0 and not spec.confidence_with_markov
    found: list[tuple[Any, str]] = [
        (spec.layer_kind != "qwen3", f"its layers are {spec.layer_kind}'s"),
        (not spec.qk_norm, "its queries and keys are not normalised"),
        (spec.sliding_window is not None, "its layers attend in a sliding window"),
        (spec.is_causal, "the rows of its block see only those before them"),
        (spec.norm_before_residual, "its residual is taken after the norm"),
        (spec.attention_bias, "its attention has biases"),
        (spec.hidden_act != "silu", f"its activation is {spec.hidden_act}"),
        (spec.rope["rope_type"] != "default", f"its rotary embedding is of the type {spec.rope['rope_type']}"),
        (not spec.anchor_predicts, "its anchor's row predicts nothing"),
        (spec.own_head, "it has an output head of its own"),
        (spec.own_embedding, "it has an embedding of its own"),
        (markov_blind, "its confidence head does not see the Markov head's embedding"),
    ]
    return [reason for holds, reason in found if holds]
