"""Calibration of a drafter's confidences before it has served anybody: fitted to rounds on held-out answers.

`dspark calibrate` does the same from recordings of a server, and serving goes on learning (scheduler/recalibration.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from dspark_serving.errors import DataError
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.calibration_fit import Labels, fit_temperatures, survival_quality
from dspark_serving.scheduler.calibration_quality import Quality
from dspark_serving.scheduler.survival_map import MapLabels, SurvivalMap, fit_survival_map
from dspark_training.bundle.export import Confidence
from dspark_training.bundle.rounds import HeldOutRounds
from dspark_training.data.chat import ChatTemplate, TemplateMismatchError
from dspark_training.data.conversation import Prompt
from dspark_training.data.dialogue import Dialogue
from dspark_training.data.generate import Request, complete
from dspark_training.data.skipped import Skipped
from dspark_training.data.store import Sample
from dspark_training.target import Target

log = logging.getLogger(__name__)

_CLEARLY = 0.99
"""A map's Brier score by the head's, below which it takes the head's place: a softmax a draft should pay."""


class FittedConfidence(NamedTuple):
    """What ships with the drafter, and how good it was on answers that it was not fitted to."""

    confidence: Confidence
    before: list[Quality]  # of the survival up to each position, with neither map nor temperatures fitted
    after: list[Quality]  # fitted to one half of the answers, scored on the other, like `before`


def held_out_labels(rounds: HeldOutRounds, survival_map: SurvivalMap | None = None) -> Labels:
    """Labels for `fit_temperatures` and `survival_quality`.

    Args:
        survival_map: judges the drafts; None: the confidence head does, or the default map where there is none.
    """
    confidence_NG = rounds.confidence_NG
    if confidence_NG is None or survival_map is not None:
        judge = survival_map or SurvivalMap.default(rounds.statistics_NG3.shape[1])
        statistics, temperature = (torch.from_numpy(x).float() for x in (rounds.statistics_NG3, rounds.temperature_N))
        confidence_NG = judge.apply(statistics, temperature).numpy()
    return Labels(confidence_NG, rounds.verify_lens_N, rounds.accepted_N)


def fit_confidence(rounds: HeldOutRounds, *, by_map: bool) -> Confidence:
    """Fit the survival map, if that is to judge the drafts, then a temperature for each position.

    Raises:
        DataError: too few verified drafts.
    """
    fitted_map = None
    if by_map:
        fitted_map = fit_survival_map(
            MapLabels(rounds.statistics_NG3, rounds.temperature_N, rounds.verify_lens_N, rounds.accepted_N)
        )
    calibration = fit_temperatures(held_out_labels(rounds, fitted_map))
    origin: dict[str, Any] = {"source": "held-out answers", "answers": len(np.unique(rounds.sample_N))}
    return Confidence(replace(calibration, fitted_on={**calibration.fitted_on, **origin}), fitted_map)


def fit_and_score(rounds: HeldOutRounds) -> FittedConfidence | None:
    """Fit to all rounds; score a fit to every other answer on the rest. None, and a warning, with too few rounds.

    A drafter with a confidence head is judged by a survival map instead where that has a clearly lower Brier score on
    the rest. Temperatures that do not lower the mean calibration error of the rest are left out: they would be noise.
    """
    try:
        if rounds.confidence_NG is None:
            return _fit_and_score(rounds, by_map=True)
        by_head = _fit_and_score(rounds, by_map=False)
    except DataError as error:
        log.warning("no calibration: %s", error)
        return None
    try:
        by_map = _fit_and_score(rounds, by_map=True)
    except DataError:
        return by_head
    return by_map if _mean(by_map.after, "brier") < _CLEARLY * _mean(by_head.after, "brier") else by_head


def _fit_and_score(rounds: HeldOutRounds, *, by_map: bool) -> FittedConfidence:
    odd_N = rounds.sample_N % 2 == 1
    shipped, half = (fit_confidence(part, by_map=by_map) for part in (rounds, rounds.rows(~odd_N)))
    rest, identity = rounds.rows(odd_N), Calibration.identity(rounds.statistics_NG3.shape[1])
    before = survival_quality(held_out_labels(rest), identity)
    judged = held_out_labels(rest, half.survival_map)
    mapped = survival_quality(judged, identity)
    scaled = survival_quality(judged, half.calibration or identity)
    if _mean(scaled, "ece") < _mean(mapped, "ece"):
        return FittedConfidence(shipped, before, scaled)
    log.info("temperatures are left out: they do not help on answers that they were not fitted to")
    return FittedConfidence(shipped._replace(calibration=None), before, mapped)


def _mean(scores: list[Quality], figure: Literal["ece", "brier"]) -> float:
    return float(np.nanmean([getattr(score, figure) for score in scores]))


def answered(
    target: Target,
    prompts: Sequence[Prompt],
    temperature: float,
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int = 0,
) -> list[Sample]:
    """The target's first answer to each prompt, to walk rounds over; in the order of the prompts.

    Prompts that the chat template refuses are left out, with a warning.
    """
    dialogues = _dialogues(target, prompts, temperature)
    requests = [Request(str(i), d.prompt_ids, temperature, max_new_tokens) for i, d in enumerate(dialogues)]
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, list[int]] = {}
    for batch in complete(target, requests, batch_size=batch_size, generator=generator):
        found |= {int(completion.key): completion.answer_ids for completion in batch}
    samples = []
    for i, dialogue in enumerate(dialogues):
        start, ids = len(dialogue.prompt_ids), dialogue.prompt_ids + found[i]
        samples.append(Sample(dialogue.prompt.key, dialogue.prompt.domain, temperature, ids, [(start, len(ids))]))
    return [sample for sample in samples if sample.supervised > 1]


def _dialogues(target: Target, prompts: Sequence[Prompt], temperature: float) -> list[Dialogue]:
    template, skipped = ChatTemplate.of(target), Skipped(None)
    dialogues = []
    for prompt in prompts:
        try:
            dialogues.append(Dialogue(prompt, template, temperature))
        except TemplateMismatchError as error:
            skipped.add(error.problem, prompt.key, prompt._asdict())
    if skipped.counts:
        log.warning("prompts to calibrate on: %s", skipped.summary())
    return dialogues
