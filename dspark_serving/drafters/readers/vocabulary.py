"""Reduced draft vocabularies as tensors: d2t and t2d, as EAGLE-3, SpecForge and speculators store them.

d2t holds for draft id i the offset of the target's id: id = i + d2t[i]. t2d holds for each id of the target whether it
is in the draft vocabulary. Source: SafeAILab/EAGLE, eagle/model/cnets.py; sglang 0.5.23, srt/models/llama_eagle3.py.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dspark_serving.drafters.fields import Fields
from dspark_serving.drafters.files import read_weight, weight_names
from dspark_serving.drafters.spec import ascending_ids
from dspark_serving.errors import CheckpointError

TABLES = ("d2t", "t2d")


def draft_token_ids(directory: Path, fields: Fields) -> tuple[int, ...] | None:
    """The ids of the draft vocabulary, ascending; None when it is the whole vocabulary.

    Raises:
        CheckpointError: draft_vocab_size asks for a table that is missing or contradicts it, or the weights cannot be
            read.
    """
    whole = fields.integer("vocab_size", low=1)
    size = fields.integer("draft_vocab_size", low=1, default=whole)
    if size == whole:
        return None
    if size > whole:
        raise fields.error(f"draft_vocab_size is {size}", f"at most vocab_size ({whole})")
    names = weight_names(directory)
    if "d2t" not in names:
        raise _wrong(directory, f"the table d2t is missing beside draft_vocab_size {size}")
    offsets = read_weight(directory, "d2t")
    if offsets.shape != (size,) or offsets.dtype not in (torch.int64, torch.int32):
        raise _wrong(
            directory, f"d2t is a {offsets.dtype} table of the shape {list(offsets.shape)}, not {size} integers"
        )
    ids = (torch.arange(size) + offsets).tolist()
    if not ascending_ids(ids, whole):
        raise _wrong(directory, f"d2t does not name {size} ascending ids below {whole}")
    if "t2d" in names:
        _check_members(directory, ids, whole)
    return tuple(ids)


def _check_members(directory: Path, ids: list[int], whole: int) -> None:
    members = read_weight(directory, "t2d")
    if members.shape != (whole,) or members.to(torch.bool).nonzero().flatten().tolist() != ids:
        raise _wrong(directory, "t2d and d2t name different ids")


def _wrong(directory: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{directory}: {problem}",
        expected="d2t with the offset of each draft id, and t2d with the same ids",
        fix="Export or copy the drafter again.",
    )
