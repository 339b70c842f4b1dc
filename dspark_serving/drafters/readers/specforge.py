"""SpecForge's block drafters: DSparkDraftModel, and DFlashDraftModel with the fields of either family nested.

Source: sgl-project/SpecForge, specforge/modeling/draft/{dflash,dspark}.py and configs/qwen3-*-{dflash,dspark}.json,
read 2026-11; which fields SGLang takes from where: sglang 0.5.23, srt/speculative/dspark_components/dspark_config.py.
The fields stand in `dflash_config`, overlaid by `dspark_config`, else at the top level; `projector_type` tells the
family. DSpark's anchor row predicts (B drafted tokens for a block of B), DFlash's does not (B - 1) unless its labels
were shifted: specforge/core/{dspark,dflash}.py. Early checkpoints keep the heads under `logit_head`.
"""

from __future__ import annotations

from pathlib import Path

from dspark_serving.drafters.fields import Fields
from dspark_serving.drafters.readers.reader import Reader, architecture, block_fields, describe, plain_rename
from dspark_serving.drafters.readers.zlab import backbone_fields
from dspark_serving.drafters.spec import DrafterSpec, Family

FORMAT = "specforge"

_NESTED = ("dflash_config", "dspark_config")
# What z-lab's DFlash drafters do not say.
_MARKS = ("projector_type", "markov_rank", "shift_label")


def recognises(fields: Fields) -> bool:
    name = architecture(fields)
    if name == "DSparkDraftModel":
        return True
    marks = fields.over(*_NESTED)
    return name == "DFlashDraftModel" and any(mark in marks for mark in _MARKS)


def read(directory: Path, fields: Fields) -> DrafterSpec:
    """Read a DSpark or DFlash drafter of SpecForge's."""
    nested = fields.over(*_NESTED)
    dspark = architecture(fields) == "DSparkDraftModel" or nested.get("projector_type") == "dspark"
    if dspark:
        nested.integer("markov_rank", low=0)
    size, whole = nested.get("draft_vocab_size"), fields.integer("vocab_size", low=1)
    if size not in (None, whole):
        raise fields.error(
            f"draft_vocab_size is {size}", f"the whole vocabulary ({whole}) for SpecForge's block drafters"
        )
    block = block_fields(nested, anchor_predicts=dspark or nested.flag("shift_label", False))
    family: Family = "dspark" if block["markov_rank"] else "dflash"
    return describe(
        directory, nested, format=FORMAT, family=family, layer_kind="qwen3", **backbone_fields(nested), **block
    )


_plain = plain_rename("embed_tokens.weight", "lm_head.weight")


def rename(name: str) -> str | None:
    """Canonical name of a weight."""
    return _plain(name.removeprefix("logit_head."))


READER = Reader(format=FORMAT, recognises=recognises, read=read, rename=rename)
