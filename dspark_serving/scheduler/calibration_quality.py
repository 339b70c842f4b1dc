"""How well probabilities agree with what happened: ECE, Brier score, AUROC, reliability curve."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BINS = 15  # of equal width, as in Guo et al. 2017 (arXiv 1706.04599)


class Reliability(NamedTuple):
    """The occupied bins of a reliability diagram."""

    predicted_M: np.ndarray  # mean probability in the bin
    observed_M: np.ndarray  # share of positive labels in the bin
    count_M: np.ndarray  # labels in the bin


class Quality(NamedTuple):
    """Of the probabilities of one position; all nan without labels."""

    labels: int
    ece: float  # expected calibration error: mean |predicted - observed| of the bins, weighted by their labels
    brier: float  # mean squared error
    auroc: float  # probability that a positive label got the higher probability; nan when all labels are equal


def reliability(probability_N: np.ndarray, label_N: np.ndarray) -> Reliability:
    """The reliability curve of probabilities [N] for labels [N] (0 or 1)."""
    bin_N = np.minimum((probability_N * BINS).astype(np.int64), BINS - 1)
    count_M = np.bincount(bin_N, minlength=BINS)
    occupied = count_M > 0
    predicted_M = np.bincount(bin_N, probability_N, BINS)[occupied] / count_M[occupied]
    observed_M = np.bincount(bin_N, label_N, BINS)[occupied] / count_M[occupied]
    return Reliability(predicted_M, observed_M, count_M[occupied])


def expected_calibration_error(probability_N: np.ndarray, label_N: np.ndarray) -> float:
    """ECE; nan without labels."""
    if not len(label_N):
        return float("nan")
    predicted_M, observed_M, count_M = reliability(probability_N, label_N)
    return float(np.abs(predicted_M - observed_M) @ count_M / len(label_N))


def quality(probability_N: np.ndarray, label_N: np.ndarray) -> Quality:
    """All scores of probabilities [N] for labels [N] (0 or 1)."""
    if not len(label_N):
        return Quality(0, *(float("nan"),) * 3)
    ece = expected_calibration_error(probability_N, label_N)
    brier = float(np.mean((probability_N - label_N) ** 2))
    return Quality(len(label_N), ece, brier, _auroc(probability_N, label_N > 0))


def _auroc(probability_N: np.ndarray, positive_N: np.ndarray) -> float:
    """By the rank sum of Mann and Whitney; equal probabilities share their mean rank."""
    positives = int(positive_N.sum())
    pairs = positives * (len(positive_N) - positives)
    if not pairs:
        return float("nan")
    _, which_N, count = np.unique(probability_N, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2
    return float((mean_rank[which_N][positive_N].sum() - positives * (positives + 1) / 2) / pairs)
