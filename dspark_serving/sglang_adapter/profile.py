"""Measures the rounds of this very server before it takes requests: the samples that the cost model starts from.

The rounds are real ones of the worker (draft, verify, accept, commit) over synthetic requests; the batch does not
advance, so a round can be repeated.
"""

from __future__ import annotations

import logging
import time
from array import array
from typing import Any, NamedTuple

import numpy as np
from sglang.srt.managers.overlap_utils import resolve_forward_inputs
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils import get_device_module

from dspark_serving.scheduler.baselines import FullPolicy, OffPolicy
from dspark_serving.scheduler.cost import CostModel, CostSample
from dspark_serving.scheduler.round import Batch, Plan

logger = logging.getLogger(__name__)

_LAST = 0.1  # share of the time that is left to the measurement under way when it is up
_REPEATS = 2
_SHORT, _LONG = 24, 256  # tokens of the synthetic prompts
_SEED = 7


class _Group(NamedTuple):
    """Synthetic requests that are measured together."""

    requests: int
    prompt: int  # tokens of each
    temperature: float = 0.0


class _FixedPolicy(FullPolicy):
    """Verify the same number of tokens of every request, whatever the drafter says of them."""

    name = "fixed"

    def __init__(self, verify_len: int) -> None:
        self._verify_len = verify_len

    def plan(self, batch: Batch) -> Plan:
        """Draft; a capacity below the whole window keeps SGLang from its shortcut for full verification."""
        return super().plan(batch)._replace(capacity=batch.requests * (self._verify_len - 1))

    def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
        """The same for all."""
        return np.full(batch.requests, self._verify_len, dtype=np.int32)


def profile_engine(scheduler: Any, deadline: float) -> list[CostSample]:
    """Time rounds over a grid of batch sizes, verify lengths and contexts.

    Args:
        scheduler: SGLang's scheduler, completely constructed, with our worker.
        deadline: stop then (time.monotonic); the ends of the grid come first, so what is left out lies between them.
            The first of them is measured in any case.
    """
    return _measure(scheduler, _groups(scheduler), deadline)


def relative_error(scheduler: Any, cost: CostModel, deadline: float) -> float:
    """Median relative error of predicted round times, in a few rounds of one request and of a middling batch."""
    sizes = dict.fromkeys((1, min(8, _most_requests(scheduler))))
    samples = _measure(scheduler, [_Group(size, _SHORT) for size in sizes], deadline)
    predicted = [cost.seconds(s.requests, s.tokens, s.context, s.drafted) for s in samples]
    return float(np.median([abs(sample.seconds / p - 1.0) for sample, p in zip(samples, predicted, strict=True)]))


def _measure(scheduler: Any, groups: list[_Group], deadline: float) -> list[CostSample]:
    worker = scheduler.draft_worker
    before, started = worker.policy, time.monotonic()
    deadline -= _LAST * max(deadline - started, 0.0)
    samples: list[CostSample] = []
    try:
        for group in groups:
            samples += _profile_group(scheduler, group, deadline)
            if worker.any_rank_past(deadline):
                break
    finally:
        worker.use(before)
        worker.forget_rounds()
    sizes = sorted({s.requests for s in samples})
    logger.info("measured %d rounds of %s requests in %.1f s", len(samples), sizes, time.monotonic() - started)
    return samples


def _groups(scheduler: Any) -> list[_Group]:
    """Batch sizes from the ends inwards; one of them sampled too, and one with a long context."""
    most, room = _most_requests(scheduler), _room(scheduler)
    sizes = [size for size in (1, most, 4, most // 2, 8, 2, most // 4) if 1 <= size <= most]
    groups = [_Group(size, _SHORT) for size in dict.fromkeys(sizes)]
    groups.insert(3, _Group(min(8, most), _SHORT, temperature=1.0))
    if room >= 4 * (_LONG + _width(scheduler)):
        groups.insert(4, _Group(4, _LONG))
    return groups


def _most_requests(scheduler: Any) -> int:
    return max(1, min(int(scheduler.max_running_requests), _room(scheduler) // (_SHORT + _width(scheduler))))


def _room(scheduler: Any) -> int:
    """Tokens of the cache that the profile may take."""
    return int(scheduler.max_total_num_tokens) // 2


def _width(scheduler: Any) -> int:
    """Tokens that a round reserves for a request."""
    return 2 * int(scheduler.draft_worker.verify_num_draft_tokens)


def _profile_group(scheduler: Any, group: _Group, deadline: float) -> list[CostSample]:
    reqs = _synthetic_requests(scheduler, group)
    try:
        samples = _time_rounds(scheduler, _prefill(scheduler, reqs), deadline)
        return [sample._replace(sampled=group.requests) for sample in samples] if group.temperature else samples
    finally:
        for req in reqs:
            release_kv_cache(req, scheduler.tree_cache, checkpoint=False)


def _synthetic_requests(scheduler: Any, group: _Group) -> list[Req]:
    prompt = group.prompt
    rng = np.random.default_rng(_SEED + prompt)
    reqs = []
    for i in range(group.requests):
        params = SamplingParams(temperature=group.temperature, max_new_tokens=prompt)
        params.normalize(scheduler.tokenizer)
        ids = array("q", rng.integers(0, scheduler.model_config.vocab_size, size=prompt).tolist())
        req = Req(rid=f"dspark-profile-{i}", origin_input_text="", origin_input_ids=ids, sampling_params=params)
        req.init_next_round_input(scheduler.tree_cache)
        req.lock = scheduler.tree_cache.lock(req.last_node)
        req.extend_end = len(req.full_untruncated_fill_ids)
        reqs.append(req)
    return reqs


def _prefill(scheduler: Any, reqs: list[Req]) -> ScheduleBatch:
    batch = ScheduleBatch.init_new(
        reqs,
        scheduler.req_to_token_pool,
        scheduler.token_to_kv_pool_allocator,
        scheduler.tree_cache,
        scheduler.model_config,
        False,
        scheduler.spec_algorithm,
    )
    batch.prepare_for_extend()
    batch.forward_iter = 0
    resolve_forward_inputs(batch, scheduler.future_map)
    with scheduler._forward_isolation(batch, overlap=False):
        result = scheduler.draft_worker.forward_batch_generation(batch)
    batch.spec_info = result.next_draft_input
    for req in reqs:
        req.output_ids.append(0)
    return batch


def _time_rounds(scheduler: Any, batch: ScheduleBatch, deadline: float) -> list[CostSample]:
    """Plain rounds, full verification and half of it, each once to warm up and then timed."""
    worker = scheduler.draft_worker
    requests, block = len(batch.reqs), worker.verify_num_draft_tokens
    context = int(sum(len(req.origin_input_ids) for req in batch.reqs))
    samples = []
    for verify_len in (1, block, (block + 1) // 2 + 1):
        drafted = verify_len > 1
        worker.use(_FixedPolicy(verify_len) if drafted else OffPolicy())
        for repeat in range(1 + _REPEATS):
            started = time.perf_counter()
            _round(scheduler, batch)
            taken = time.perf_counter() - started
            draft_seconds = worker.draft_seconds if drafted else 0.0
            if repeat:
                samples.append(CostSample(requests, requests * verify_len, context, draft_seconds, taken, drafted))
        if worker.any_rank_past(deadline):
            break
    return samples


def _round(scheduler: Any, batch: ScheduleBatch) -> None:
    """One round that leaves the batch as it was."""
    batch.prepare_for_decode()
    batch.forward_iter = 0
    resolve_forward_inputs(batch, scheduler.future_map)
    with scheduler._forward_isolation(batch, overlap=False):
        scheduler.draft_worker.forward_batch_generation(batch)
    get_device_module().synchronize()
