"""From SGLang's batches to the scheduler's `Batch`, and from finished rounds to its `Outcome`."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch

from dspark_serving.scheduler.round import Batch, Outcome, Plan
from dspark_serving.sglang_adapter.device import HostCopy

logger = logging.getLogger(__name__)

MOST_WISH = 1e6
"""The largest weight or speed that a request may ask for, and the reciprocal of the smallest."""
_REMEMBERED = 256  # ignored wishes
_UNFINISHED = 8  # rounds between launch and result: one without overlap, two with it
_IDLE_SHARE = (
    0.5  # a pause before a round longer than this share of it means that the server was idle or busy elsewhere
)


class _Wishes(NamedTuple):
    """What the requests of a batch ask for; constant while the batch has the same members."""

    slots_R: np.ndarray
    generations_R: np.ndarray
    temperature_R: np.ndarray
    weight_R: np.ndarray
    floor_R: np.ndarray


class BatchReader:
    """Reads what the scheduler may know of a running batch.

    A request may carry `custom_params={"dspark": {"weight": w, "min_tokens_per_second": s}}` in its sampling
    parameters: what one of its tokens is worth against another request's, and the speed it should get at least.
    """

    def __init__(self, generations: torch.Tensor) -> None:
        self._generations = generations.numpy()  # of every row of the request pool, kept by SGLang on the host
        self._wishes: _Wishes | None = None
        self._told: deque[tuple[str, str]] = deque(maxlen=_REMEMBERED)  # wishes that the log has been told of

    def read(self, batch: Any) -> Batch:
        """The batch before its round."""
        indices = batch.req_pool_indices_cpu
        slots_R = (batch.req_pool_indices.cpu() if indices is None else indices).numpy()
        generations_R = self._generations[slots_R]
        wishes = self._wishes
        if (
            wishes is None
            or not np.array_equal(wishes.slots_R, slots_R)
            or not np.array_equal(wishes.generations_R, generations_R)
        ):
            self._wishes = wishes = self._read_wishes(batch.reqs, slots_R.astype(np.int64), generations_R)
        lens = batch.seq_lens_cpu if batch.seq_lens_cpu is not None else batch.seq_lens.cpu()
        context_R = lens.numpy().astype(np.int64)
        return Batch(
            wishes.slots_R, wishes.generations_R, context_R, wishes.temperature_R, wishes.weight_R, wishes.floor_R
        )

    def _read_wishes(self, requests: list[Any], slots_R: np.ndarray, generations_R: np.ndarray) -> _Wishes:
        temperatures, weights, floors = [], [], []
        for request in requests:
            params = request.sampling_params
            temperatures.append(0.0 if params.top_k == 1 else params.temperature)
            custom = params.custom_params  # anything: SGLang does not look at it
            asked = custom.get("dspark", {}) if isinstance(custom, dict) else {}
            weights.append(self._positive(request.rid, asked, "weight", 1.0))
            floors.append(self._positive(request.rid, asked, "min_tokens_per_second", 0.0))
        as_floats = (np.array(values, dtype=np.float32) for values in (temperatures, weights, floors))
        return _Wishes(slots_R, generations_R, *as_floats)

    def _positive(self, rid: str, asked: Any, name: str, default: float) -> float:
        """A wish of a request; one that cannot be read is ignored, so that no request can stop the server."""
        value = asked.get(name, default) if isinstance(asked, dict) else None
        if isinstance(value, int | float) and (1 / MOST_WISH <= value <= MOST_WISH or value == default):
            return float(value)
        if (rid, name) not in self._told:
            self._told.append((rid, name))
            logger.warning(
                "request %s: dspark.%s is %.100r; expected a positive number of at most %.0e. It is ignored.",
                rid, name, value, MOST_WISH,
            )  # fmt: skip
        return default


class Launched(NamedTuple):
    """A round whose result is not known yet."""

    batch: Batch
    plan: Plan
    confidence_RG: HostCopy | None
    verify_lens_R: HostCopy
    draft_seconds: float
    started: float
    steady: bool


class RoundLog:
    """Matches launched rounds with their results and measures them.

    A round's time runs from the result before it to its own, which holds with and without overlap; the first round
    after a prefill or a pause is measured from its launch and marked as not steady.
    """

    def __init__(self) -> None:
        self._launched: deque[Launched] = deque(maxlen=_UNFINISHED)
        self._completed = 0.0
        self._interrupted = True

    def interrupt(self) -> None:
        """A prefill ran: the next round's period holds more than the round."""
        self._interrupted = True

    def launch(self, *, started: float, **facts: Any) -> None:
        """Keep a launched round (fields of `Launched` without `steady`)."""
        self._launched.append(Launched(**facts, started=started, steady=not self._interrupted))
        self._interrupted = False

    def forget(self) -> None:
        """Drop rounds whose results will never come."""
        self._launched.clear()
        self._interrupted = True

    def complete(self, accepted: list[int]) -> Outcome | None:
        """The outcome of the oldest launched round; None when the result is of no round that was launched here."""
        now = time.perf_counter()
        before, self._completed = self._completed, now
        if not self._launched:
            return None
        launched = self._launched.popleft()
        if len(accepted) != launched.batch.requests:
            return None
        own = now - launched.started
        steady = launched.steady and launched.started - before < _IDLE_SHARE * own
        return Outcome(
            launched.batch,
            launched.plan,
            None if launched.confidence_RG is None else launched.confidence_RG.numpy(),
            launched.verify_lens_R.numpy(),
            np.array(accepted, dtype=np.int32),
            launched.draft_seconds,
            now - before if steady else own,
            steady,
        )
