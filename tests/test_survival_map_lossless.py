"""Confidences from draft distributions: the text stays exact, and a look ahead would be seen.

Appendix A of the DSpark paper with a whole vocabulary, by enumeration.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from dspark_serving.scheduler.baselines import Algorithm1Policy, ThresholdPolicy
from dspark_serving.scheduler.round import Batch, Policy
from dspark_serving.scheduler.survival_map import SurvivalMap, draft_statistics
from tests.scheduler_worlds import LinearCosts

GAMMA = 3
VOCABULARY, TEXT = 3, 2
_TABLES = np.random.default_rng(11).normal(0, 2.0, (2, VOCABULARY, VOCABULARY))
TARGET_VV = np.exp(_TABLES[0]) / np.exp(_TABLES[0]).sum(axis=1, keepdims=True)
DRAFT_LOGITS_VV = torch.from_numpy(_TABLES[1])
DRAFT_VV = DRAFT_LOGITS_VV.softmax(dim=1).numpy()
Judge = Callable[[list[int]], torch.Tensor]
"""Statistics [1, G, 3] of a block, given the anchor and the drafted tokens."""


def before_the_draw(tokens: list[int]) -> torch.Tensor:
    return draft_statistics(DRAFT_LOGITS_VV[tokens[:-1]])[None]


def of_the_drawn_token(tokens: list[int]) -> torch.Tensor:
    """Looks ahead: the log-odds are those of the token that was drawn."""
    statistics_1G3 = before_the_draw(tokens)
    own_G = torch.from_numpy(DRAFT_VV[tokens[:-1], tokens[1:]])
    statistics_1G3[0, :, 0] = own_G.logit()
    return statistics_1G3


def after_the_draw(tokens: list[int]) -> torch.Tensor:
    """Looks ahead too: statistics of the distribution behind the drawn token."""
    return draft_statistics(DRAFT_LOGITS_VV[tokens[1:]])[None]


def round_outcomes(policy: Policy, judge: Judge, last: int) -> Iterator[tuple[float, list[int]]]:
    """(probability, emitted tokens) of a round behind `last`; several may be the same."""
    batch = Batch.ordinary(np.arange(1), np.full(1, 10))._replace(temperature_R=np.ones(1, dtype=np.float32))
    plan = policy.plan(batch)
    for drafted in itertools.product(range(VOCABULARY), repeat=GAMMA):
        tokens = [last, *drafted]
        confidence_RG = SurvivalMap.default(GAMMA).apply(judge(tokens), torch.ones(1)).numpy()
        verified = int(policy.admit(batch, plan, confidence_RG)[0]) - 1
        chance = math.prod(DRAFT_VV[a, b] for a, b in itertools.pairwise(tokens))
        for k in range(verified):
            p_V, q_V = TARGET_VV[tokens[k]], DRAFT_VV[tokens[k]]
            accepts = min(1.0, p_V[tokens[k + 1]] / q_V[tokens[k + 1]])
            residual_V = np.maximum(p_V - q_V, 0.0)
            for token in np.flatnonzero(residual_V):
                rejected = chance * (1 - accepts) * residual_V[token] / residual_V.sum()
                yield rejected, [*tokens[1 : k + 1], int(token)]
            chance *= accepts
        for bonus in range(VOCABULARY):
            yield chance * TARGET_VV[tokens[verified], bonus], [*tokens[1 : verified + 1], bonus]


def text_distribution(policy: Policy, judge: Judge, last: int, length: int) -> np.ndarray:
    """Probability of every text of `length` tokens behind `last`, [V] * length."""
    total = np.zeros((VOCABULARY,) * length)
    for chance, emitted in round_outcomes(policy, judge, last):
        if len(emitted) >= length:
            total[tuple(emitted[:length])] += chance
        elif chance > 0:
            total[tuple(emitted)] += chance * text_distribution(policy, judge, emitted[-1], length - len(emitted))
    return total


def bias(policy: Policy, judge: Judge) -> float:
    """Total variation between the text's distribution and the target's own."""
    exact = np.einsum("a,ab->ab", TARGET_VV[0], TARGET_VV)
    return float(np.abs(text_distribution(policy, judge, 0, TEXT) - exact).sum() / 2)


POLICIES: dict[str, Policy] = {
    "threshold 0.5": ThresholdPolicy(0.5),
    "threshold 0.7": ThresholdPolicy(0.7),
    "algorithm1": Algorithm1Policy(LinearCosts(base=0.01, per_token=0.01)),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_text_keeps_the_target_distribution(name: str) -> None:
    lengths = {len(tokens) for _, tokens in round_outcomes(POLICIES[name], before_the_draw, 0)}
    assert len(lengths) > 1, "the control: something is verified"
    assert bias(POLICIES[name], before_the_draw) < 1e-9


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("judge", [of_the_drawn_token, after_the_draw], ids=lambda judge: judge.__name__)
def test_the_same_check_catches_statistics_that_look_ahead(name: str, judge: Judge) -> None:
    assert bias(POLICIES[name], judge) > 0.01
