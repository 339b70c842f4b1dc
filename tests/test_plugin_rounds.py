"""What the scheduler is told of SGLang's batches and rounds: wishes of requests, times, results that never come."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dspark_serving.scheduler.baselines import FullPolicy
from dspark_serving.scheduler.round import Batch
from dspark_serving.sglang_adapter.device import HostCopy
from dspark_serving.sglang_adapter.rounds import BatchReader, RoundLog


def batch(slots: list[int], *params: dict[str, Any]) -> SimpleNamespace:
    defaults = {"top_k": 1 << 30, "temperature": 0.7, "custom_params": None}
    reqs = [
        SimpleNamespace(rid=f"r{i}", sampling_params=SimpleNamespace(**(defaults | given)))
        for i, given in enumerate(params)
    ]
    return SimpleNamespace(
        reqs=reqs,
        req_pool_indices_cpu=torch.tensor(slots),
        req_pool_indices=torch.tensor(slots),
        seq_lens_cpu=torch.tensor([10 * slot for slot in slots]),
    )


def test_reads_what_requests_ask_for() -> None:
    generations = torch.tensor([0, 3, 1, 9])
    asked = {"dspark": {"weight": 2.0, "min_tokens_per_second": 30}}
    read = BatchReader(generations).read(batch([3, 1], {"top_k": 1}, {"custom_params": asked}))
    assert read.slots_R.tolist() == [3, 1]
    assert read.generations_R.tolist() == [9, 3]
    assert read.context_R.tolist() == [30, 10]
    assert read.temperature_R.tolist() == pytest.approx([0.0, 0.7])  # SGLang marks greedy requests by top_k 1
    assert read.weight_R.tolist() == [1.0, 2.0]
    assert read.floor_R.tolist() == [0.0, 30.0]


@pytest.mark.parametrize(
    "asked",
    [
        {"weight": -1},
        {"weight": "much"},
        {"weight": float("nan")},
        {"weight": 1e30},
        {"weight": 1 << 5000},
        {"min_tokens_per_second": [1]},
        "fast",
    ],
)
def test_a_wish_that_cannot_be_read_is_ignored_with_a_warning(asked: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read = BatchReader(torch.zeros(4, dtype=torch.int64)).read(batch([1], {"custom_params": {"dspark": asked}}))
    assert (read.weight_R.tolist(), read.floor_R.tolist()) == ([1.0], [0.0])
    assert "request r0: dspark." in caplog.text


@pytest.mark.parametrize("custom", [[1], "dspark", 5, {}, {"other": {"weight": 3}}])
def test_custom_params_of_any_other_kind_ask_for_nothing(custom: Any, caplog: pytest.LogCaptureFixture) -> None:
    read = BatchReader(torch.zeros(4, dtype=torch.int64)).read(batch([1], {"custom_params": custom}))
    assert (read.weight_R.tolist(), read.floor_R.tolist(), caplog.text) == ([1.0], [0.0], "")


def test_an_ignored_wish_is_said_once_whoever_joins(caplog: pytest.LogCaptureFixture) -> None:
    reader = BatchReader(torch.zeros(8, dtype=torch.int64))
    for others in range(4):
        reader.read(batch([1, *range(2, 2 + others)], {"custom_params": {"dspark": "fast"}}, *[{}] * others))
    assert caplog.text.count("dspark.weight") == caplog.text.count("dspark.min_tokens_per_second") == 1


def test_a_slot_with_a_new_request_is_read_anew() -> None:
    generations = torch.zeros(4, dtype=torch.int64)
    reader = BatchReader(generations)
    assert reader.read(batch([2], {})).weight_R.tolist() == [1.0]
    generations[2] += 1
    asked = {"dspark": {"weight": 5}}
    assert reader.read(batch([2], {"custom_params": asked})).weight_R.tolist() == [5.0]


class Clock:
    """Stands in for `time.perf_counter`."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "perf_counter", found)
    return found


def launch(log: RoundLog, clock: Clock, requests: int = 2) -> None:
    read = Batch.ordinary(np.arange(requests), np.arange(requests))
    log.launch(
        batch=read,
        plan=FullPolicy().plan(read),
        confidence_RG=None,
        verify_lens_R=HostCopy(torch.full((requests,), 4, dtype=torch.int32)),
        draft_seconds=0.01,
        started=clock.now,
    )


def test_a_steady_round_lasts_from_result_to_result(clock: Clock) -> None:
    log = RoundLog()
    launch(log, clock)
    clock.now += 0.1
    first = log.complete([1, 0])
    clock.now += 0.005  # the host sends tokens out
    launch(log, clock)
    clock.now += 0.1
    second = log.complete([2, 3])
    assert first is not None
    assert second is not None
    assert (first.steady, second.steady) == (False, True)
    assert second.seconds == pytest.approx(0.105)
    assert second.accepted_R.tolist() == [2, 3]


@pytest.mark.parametrize("disturbance", ["prefill", "pause"])
def test_a_round_after_something_else_is_not_steady(clock: Clock, disturbance: str) -> None:
    log = RoundLog()
    launch(log, clock)
    clock.now += 0.1
    log.complete([1, 0])
    if disturbance == "prefill":
        log.interrupt()
    else:
        clock.now += 3.0
    launch(log, clock)
    clock.now += 0.1
    found = log.complete([1, 0])
    assert found is not None
    assert not found.steady
    assert found.seconds == pytest.approx(0.1)


def test_results_of_unknown_rounds_are_left_alone(clock: Clock) -> None:
    log = RoundLog()
    assert log.complete([1]) is None
    launch(log, clock, requests=2)
    assert log.complete([1]) is None
    launch(log, clock)
    log.forget()
    assert log.complete([1, 1]) is None


def test_overlapped_rounds_are_matched_in_order(clock: Clock) -> None:
    log = RoundLog()
    launch(log, clock, requests=1)
    launch(log, clock, requests=2)
    first, second = log.complete([1]), log.complete([2, 2])
    assert first is not None
    assert second is not None
    assert (first.batch.requests, second.batch.requests) == (1, 2)
