"""Confidences from how sure the draft distribution is of itself: without a confidence head, or better than by one.

logit c_k = weights . statistics_k + bias_k, one set of weights for greedy and one for sampled requests: acceptance by
argmax and by rejection sampling are different labels. The statistics are of the distribution from which x_k is about
to be drawn, so c_k depends on x_<k only. The probability of the drawn token itself would tell what was drawn, and a
truncation by it would change the distribution of the text (DSpark paper, Appendix A).

What becomes of the drafts corrects the result further, as it does a head's: calibration.py, recalibration.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dspark_serving.errors import DataError

FILE_NAME = "survival_map.json"
STATISTICS = ("log_odds", "log_margin", "entropy")
MIN_LABELS = 200  # below, greedy or sampled requests keep the default
_LOG_ODDS_LIMIT = 13.8  # of probabilities 1e-6 and 1 - 1e-6, like the confidences' in calibration.py
_MARGIN_LIMIT = 20.0
_WEIGHT_LIMIT = 100.0
_PRECISION = 0.1  # of the prior around the default: a few labels cannot move far
_FIX = "Fit it again, or remove the file to serve with the default map."


def draft_statistics(
    logits_RV: torch.Tensor, probability_RV: torch.Tensor | None = None, vocab_size: int | None = None
) -> torch.Tensor:
    """What a draft distribution says of its own certainty, [..., 3] float32, in the order of STATISTICS.

    The log-odds of the most probable token, the log-ratio of the two most probable ones (both bounded), and the
    entropy as a share of that of a uniform distribution over the vocabulary. Nothing waits for the device.

    Args:
        logits_RV: [..., V], V >= 2, at the temperature that the token is drawn at, and as they are for greedy ones.
        probability_RV: their softmax, where it is at hand.
        vocab_size: of the target, where the logits are only of the tokens that may be drafted.
    """
    logits_RV = logits_RV.float()
    if probability_RV is None:
        probability_RV = logits_RV.softmax(dim=-1)
    best_R2 = logits_RV.topk(2, dim=-1).values
    top_R = probability_RV.amax(dim=-1)
    # Entropy = log sum exp - mean logit; a masked logit of -inf has no share in the mean.
    mean_R = (probability_RV * (logits_RV - best_R2[..., :1]).clamp_min(-1e30)).sum(dim=-1)
    entropy_R = (-top_R.log() - mean_R) / math.log(vocab_size or logits_RV.shape[-1])
    return torch.stack(
        [
            top_R.logit().clamp(-_LOG_ODDS_LIMIT, _LOG_ODDS_LIMIT),
            (best_R2[..., 0] - best_R2[..., 1]).clamp(0.0, _MARGIN_LIMIT),
            entropy_R.clamp(0.0, 1.0),
        ],
        dim=-1,
    )


class Line(NamedTuple):
    """Coefficients of the logit."""

    weights_3: tuple[float, ...]
    bias_G: tuple[float, ...]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    weights: list[float] = Field(min_length=len(STATISTICS), max_length=len(STATISTICS))
    biases: list[float] = Field(min_length=1)

    def line(self) -> Line:
        return Line(tuple(self.weights), tuple(self.biases))


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    version: Literal[1]
    gamma: int = Field(ge=1)
    statistics: list[str]
    greedy: _Line
    sampled: _Line
    fitted_on: dict[str, str | int | float | list[int]]


@dataclass(frozen=True)
class SurvivalMap:
    """From statistics of draft distributions to confidences.

    Raises:
        DataError: coefficients of the wrong number, or one that is not a number within +-100.
    """

    greedy: Line
    sampled: Line
    fitted_on: Mapping[str, str | int | float | list[int]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name, line in (("greedy", self.greedy), ("sampled", self.sampled)):
            numbers = [*line.weights_3, *line.bias_G]
            if len(line.weights_3) != len(STATISTICS) or not all(abs(x) <= _WEIGHT_LIMIT for x in numbers):
                raise DataError(
                    f"the survival map has the coefficients {numbers} for {name} requests",
                    expected=f"{len(STATISTICS)} weights and a bias for each position, within +-{_WEIGHT_LIMIT:g}",
                    fix=_FIX,
                )
        if not self.gamma or len(self.sampled.bias_G) != self.gamma:
            raise DataError(
                f"the survival map has {self.gamma} and {len(self.sampled.bias_G)} biases",
                expected="one for each position of the block, for greedy and for sampled requests",
                fix=_FIX,
            )

    @classmethod
    def default(cls, gamma: int) -> SurvivalMap:
        """Without any data.

        Greedy: a drafter that predicts the target's tokens is right with its own top probability. Sampled: acceptance
        is the overlap of two distributions, which depends less on how sure the drafter is. On the shipped drafter over
        GSM8K the greedy line was better than its trained head (AUROC .81 against .74), and fits gave slopes .9 and .6.
        """
        return cls(Line((1.0, 0.0, 0.0), (0.0,) * gamma), Line((0.5, 0.0, 0.0), (0.0,) * gamma))

    @property
    def gamma(self) -> int:
        """G."""
        return len(self.greedy.bias_G)

    def apply(self, statistics_RG3: torch.Tensor, temperature_R: torch.Tensor) -> torch.Tensor:
        """Confidences [R, G] float32 within (0, 1), on the statistics' device and without waiting for it.

        Args:
            statistics_RG3: of `draft_statistics`.
            temperature_R: of each request; 0 is greedy.
        """
        weights_23, bias_2G = _coefficients(self, statistics_RG3.device)
        band_R = (temperature_R > 0).long()
        logits_RG = (statistics_RG3 * weights_23[band_R][:, None]).sum(dim=-1) + bias_2G[band_R]
        return logits_RG.clamp(-_LOG_ODDS_LIMIT, _LOG_ODDS_LIMIT).sigmoid()

    @classmethod
    def load(cls, path: Path, gamma: int) -> SurvivalMap:
        """The map in a file, for drafters of block size `gamma`.

        Raises:
            DataError: the file is missing, damaged, no survival map, or made for another block size.
        """
        try:
            found = _File.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise DataError(
                f"{path} cannot be used ({_reason(error)})", expected="a survival map of version 1", fix=_FIX
            ) from error
        if tuple(found.statistics) != STATISTICS:
            raise DataError(f"{path} is of {found.statistics}", expected=f"{list(STATISTICS)}", fix=_FIX)
        counts = {found.gamma, len(found.greedy.biases), len(found.sampled.biases)}
        if counts != {gamma}:
            raise DataError(
                f"{path} is for block size {found.gamma}, with {len(found.greedy.biases)} and "
                f"{len(found.sampled.biases)} biases",
                expected=f"{gamma} for the drafter's block size of {gamma}",
                fix=_FIX,
            )
        return cls(found.greedy.line(), found.sampled.line(), found.fitted_on)

    def save(self, path: Path) -> None:
        """Write the file that `load` reads; a reader sees the old contents or the new, never a part."""
        lines = (self.greedy, self.sampled)
        greedy, sampled = (_Line(weights=list(line.weights_3), biases=list(line.bias_G)) for line in lines)
        content = _File(
            version=1,
            gamma=self.gamma,
            statistics=list(STATISTICS),
            greedy=greedy,
            sampled=sampled,
            fitted_on=dict(self.fitted_on),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(content.model_dump_json(indent=2) + "\n")
        os.replace(partial, path)


def survival_map_beside(weights: Path, gamma: int, *, has_head: bool) -> SurvivalMap | None:
    """What judges the drafts of a drafter: the map in its directory, else, without a confidence head, the default map.

    None: the head judges them.

    Raises:
        DataError: the file cannot be used.
    """
    path = weights / FILE_NAME
    if path.is_file():
        return SurvivalMap.load(path, gamma)
    return None if has_head else SurvivalMap.default(gamma)


class MapLabels(NamedTuple):
    """One row for each request and drafting round."""

    statistics_NG3: np.ndarray  # of `draft_statistics`
    temperature_N: np.ndarray  # 0 is greedy
    verify_lens_N: np.ndarray  # anchor included
    accepted_N: np.ndarray  # accepted drafts, without the bonus token


def fit_survival_map(labels: MapLabels) -> SurvivalMap:
    """Logistic regression of acceptance on the statistics, with a weak prior around the default.

    Only verified positions whose prefix was accepted are labels: of the others it is not known whether they would have
    survived (calibration_fit.py says what counting them would do). Statistics that are no numbers are left out.

    Raises:
        DataError: neither greedy nor sampled requests have MIN_LABELS labels.
    """
    gamma = labels.statistics_NG3.shape[1]
    default = SurvivalMap.default(gamma)
    position_G = np.arange(gamma)
    label_NG = position_G < np.minimum(labels.verify_lens_N - 1, labels.accepted_N + 1)[:, None]
    label_NG &= np.isfinite(labels.statistics_NG3).all(axis=2)
    sampled_N = labels.temperature_N > 0
    lines, counts = [], []
    for line, row_N in ((default.greedy, ~sampled_N), (default.sampled, sampled_N)):
        row, position = np.nonzero(label_NG & row_N[:, None])
        counts.append(len(row))
        if len(row) >= MIN_LABELS:
            survived_M = position < labels.accepted_N[row]
            line = _fit_line(labels.statistics_NG3[row, position], position, survived_M, line)
        lines.append(line)
    if max(counts) < MIN_LABELS:
        raise DataError(
            f"there are {counts[0]} labels of greedy and {counts[1]} of sampled requests",
            expected=f"at least {MIN_LABELS} of either",
            fix="Collect more verified drafts.",
        )
    return SurvivalMap(lines[0], lines[1], {"greedy_labels": counts[0], "sampled_labels": counts[1]})


def _fit_line(statistics_M3: np.ndarray, position_M: np.ndarray, survived_M: np.ndarray, prior: Line) -> Line:
    """The most probable coefficients."""
    gamma = len(prior.bias_G)
    one_hot_MG = np.eye(gamma)[position_M]
    inputs_MD = torch.from_numpy(np.concatenate([statistics_M3, one_hot_MG], axis=1)).double()
    target_M = torch.from_numpy(survived_M.astype(np.float64))
    prior_D = torch.tensor([*prior.weights_3, *prior.bias_G], dtype=torch.float64)
    theta_D = prior_D.clone().requires_grad_()
    search = torch.optim.LBFGS([theta_D], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        misfit = torch.nn.functional.binary_cross_entropy_with_logits(inputs_MD @ theta_D, target_M, reduction="sum")
        total: torch.Tensor = (misfit + 0.5 * _PRECISION * ((theta_D - prior_D) ** 2).sum()) / len(target_M)
        total.backward()
        return total

    search.step(loss)
    found = theta_D.detach().clamp(-_WEIGHT_LIMIT, _WEIGHT_LIMIT).tolist()
    return Line(tuple(found[: len(STATISTICS)]), tuple(found[len(STATISTICS) :]))


def _reason(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    first = error.errors()[0]
    return ".".join(map(str, first["loc"])) + ": " * bool(first["loc"]) + first["msg"]


@lru_cache(maxsize=8)
def _coefficients(survival_map: SurvivalMap, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [2, 3] and biases [2, G], greedy first; copied to a device once, because copying waits for it."""
    greedy, sampled = survival_map.greedy, survival_map.sampled
    weights_23 = torch.tensor([greedy.weights_3, sampled.weights_3], device=device)
    return weights_23, torch.tensor([greedy.bias_G, sampled.bias_G], device=device)
