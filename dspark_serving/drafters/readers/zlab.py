"""z-lab's DFlash checkpoints, which SpecForge's plain DFlash drafters equal.

Source: z-lab/dflash, dflash/model.py, and the config.json of its published drafters (Qwen3-8B-DFlash-b16 and others),
read 2026-11. The drafter's fields stand in `dflash_config`, some at the top level. A block of B rows is the anchor and
B - 1 masks, and only the masks predict. Embedding and output head are the target's; the checkpoint has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dspark_serving.drafters.fields import Fields
from dspark_serving.drafters.readers.reader import Reader, architecture, block_fields, describe, plain_rename
from dspark_serving.drafters.spec import DrafterSpec

FORMAT = "z-lab"


def recognises(fields: Fields) -> bool:
    return architecture(fields) == "DFlashDraftModel"


def read(directory: Path, fields: Fields) -> DrafterSpec:
    """Read a DFlash drafter."""
    return describe(
        directory,
        fields,
        format=FORMAT,
        family="dflash",
        layer_kind="qwen3",
        **backbone_fields(fields),
        **block_fields(fields.over("dflash_config"), anchor_predicts=False),
    )


def backbone_fields(fields: Fields) -> dict[str, Any]:
    """What a `dflash_config` says of the backbone: feature layers, and what is done to embeddings and logits.

    Raises:
        CheckpointError: a kind of backbone that is not served.
    """
    nested = fields.over("dflash_config")
    if nested.number("output_multiplier", 1.0) != 1.0:
        raise fields.error(f"output_multiplier is {nested.get('output_multiplier')}", "logits that are not scaled")
    if nested.flag("attention_sink_bias", False) or nested.number("attention_value_scale", 1.0) != 1.0:
        raise fields.error("attention_sink_bias or attention_value_scale", "attention without sinks, values unscaled")
    capped = nested.get("final_logit_softcapping")
    return {
        "num_target_layers": nested.integer("num_target_layers", low=1) if "num_target_layers" in nested else None,
        "target_layer_ids": nested.integers("target_layer_ids"),
        "embed_scale": nested.number("input_embedding_scale", 1.0),
        "final_logit_softcapping": nested.number("final_logit_softcapping", 1.0) if capped else None,
    }


READER = Reader(
    format=FORMAT,
    recognises=recognises,
    read=read,
    rename=plain_rename("embed_tokens.weight", "lm_head.weight"),
)
