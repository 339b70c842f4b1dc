"""From the confidence head's probabilities to calibrated ones: one temperature for each position of the block.

Sequential temperature scaling of the DSpark paper: c'_k = sigmoid(logit(c_k) / T_k). `calibration_fit.py` finds the
temperatures; what is here applies them in every round, and reads and writes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dspark_serving.errors import CheckpointError

FILE_NAME = "calibration.json"
LOWEST, HIGHEST = 0.2, 5.0  # temperatures beyond these mean that something else is wrong than the calibration
_EDGE = np.float32(1e-6)  # a confidence of exactly 0 or 1 is rounding; its logit would be infinite
_ONE = np.float32(1)
_FIX = "Fit it again with `dspark calibrate`, or remove the file to serve without calibration."


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    gamma: int = Field(ge=1)
    temperatures: list[float] = Field(min_length=1)
    fitted_on: dict[str, str | int | float | list[int]]


@dataclass(frozen=True)
class Calibration:
    """Temperatures of the positions 1..G.

    Raises:
        CheckpointError: no temperatures, or one that is not a number within [LOWEST, HIGHEST].
    """

    temperatures_G: tuple[float, ...]
    fitted_on: Mapping[str, str | int | float | list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.temperatures_G or not all(LOWEST <= t <= HIGHEST for t in self.temperatures_G):
            raise CheckpointError(
                f"the calibration has the temperatures {list(self.temperatures_G)}",
                expected=f"one between {LOWEST} and {HIGHEST} for each position of the block",
                fix=_FIX,
            )

    @classmethod
    def identity(cls, gamma: int) -> Calibration:
        """Leaves confidences as they are."""
        return cls((1.0,) * gamma)

    @property
    def gamma(self) -> int:
        """G."""
        return len(self.temperatures_G)

    def apply(self, confidence_RG: np.ndarray) -> np.ndarray:
        """Calibrated probabilities [R, G], float32, of confidences in [0, 1]; NaN stays NaN."""
        if self._is_identity:
            return confidence_RG.astype(np.float32, copy=False)
        logits_RG = logit(confidence_RG)
        logits_RG *= self.scale_G
        return sigmoid(logits_RG)

    @cached_property
    def scale_G(self) -> np.ndarray:
        """1 / T, float32: the factor on the logits."""
        return np.float32(1) / np.asarray(self.temperatures_G, dtype=np.float32)

    @cached_property
    def _is_identity(self) -> bool:
        return all(t == 1.0 for t in self.temperatures_G)

    @classmethod
    def load(cls, path: Path, gamma: int) -> Calibration:
        """The calibration in a file, for drafters of block size `gamma`.

        Raises:
            CheckpointError: the file is missing, damaged, no calibration, or made for another block size.
        """
        try:
            found = _File.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise CheckpointError(
                f"{path} cannot be used ({reason})", expected="a calibration of version 1", fix=_FIX
            ) from error
        if found.gamma != gamma or len(found.temperatures) != gamma:
            raise CheckpointError(
                f"{path} holds {len(found.temperatures)} temperatures for a block size of {found.gamma}",
                expected=f"{gamma} for the drafter's block size of {gamma}",
                fix=_FIX,
            )
        return cls(tuple(found.temperatures), found.fitted_on)

    def save(self, path: Path) -> None:
        """Write the file that `load` reads; a reader sees the old contents or the new, never a part."""
        content = _File(
            version=1, gamma=self.gamma, temperatures=list(self.temperatures_G), fitted_on=dict(self.fitted_on)
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(content.model_dump_json(indent=2) + "\n")
        os.replace(partial, path)


def logit(probability: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) in float32, finite for 0 and 1, contiguous."""
    odds = np.array(probability, dtype=np.float32, order="C")
    np.maximum(odds, _EDGE, out=odds)
    np.minimum(odds, _ONE - _EDGE, out=odds)
    odds /= _ONE - odds
    return np.log(odds, out=odds)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) of float32 logits within +-88, computed in place."""
    np.negative(logits, out=logits)
    np.exp(logits, out=logits)
    logits += _ONE
    return np.reciprocal(logits, out=logits)
