"""Which tokenizer the ids of samples come from: noted beside them, compared before others join or a target reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dspark_serving.errors import DataError
from dspark_training.disk import replace_text


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of its vocabulary and its chat template."""
    said = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def note(path: Path, tokenizer: str) -> None:
    """Write the fingerprint beside a file of samples.

    Raises:
        DataError: it cannot be written.
    """
    replace_text(_beside(path), tokenizer + "\n")


def noted(path: Path) -> str | None:
    """The fingerprint beside a file of samples; None for a file by an earlier version, or by others."""
    return _beside(path).read_text().strip() if _beside(path).is_file() else None


def require_same(path: Path, found: str | None, wanted: str) -> None:
    """Raise DataError if samples name another tokenizer than `wanted`; what names none is accepted."""
    if found not in (None, wanted):
        raise DataError(
            f"the ids in {path} come from another tokenizer or chat template ({found})",
            expected=f"those of this target ({wanted})",
            fix="Let this target answer the prompts, into another file.",
        )


def _beside(path: Path) -> Path:
    return Path(f"{path}.tokenizer")
