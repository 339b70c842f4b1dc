"""Penalties and filters of verification against token-by-token definitions, without a server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dspark_serving.sglang_adapter.penalties import Penalties, is_asked_for
from dspark_serving.sglang_adapter.verification import filtered, is_filtered_here
from tests import sampled_distribution

VOCAB, GAMMA = 12, 3
END = VOCAB - 1


def request(**params: float) -> Any:
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    tokenizer = SimpleNamespace(eos_token_id=END, additional_stop_token_ids=None)
    asked = SimpleNamespace(**neutral | params, stop_token_ids={5})
    return SimpleNamespace(sampling_params=asked, output_ids=[], eos_token_ids={END}, tokenizer=tokenizer)


def batch_of(requests: list[Any], places: list[int]) -> Any:
    return SimpleNamespace(
        reqs=requests,
        req_pool_indices=torch.tensor(places),
        req_pool_indices_cpu=torch.tensor(places),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(8, 1)),
        device="cpu",
    )


def defined(logits: list[float], output: list[int], params: Any) -> list[float]:
    """The logits after `output`, one id after the other."""
    found = []
    for token, logit in enumerate(logits):
        times = output.count(token)
        if times:
            logit -= params.frequency_penalty * times + params.presence_penalty
            logit = logit * params.repetition_penalty if logit < 0 else logit / params.repetition_penalty
        ends = token in (5, END) and len(output) < params.min_new_tokens
        found.append(float("-inf") if ends else logit)
    return found


ASKED: tuple[dict[str, float], ...] = (
    {"frequency_penalty": 0.7},
    {"presence_penalty": -0.4},
    {"repetition_penalty": 1.8},
    {"frequency_penalty": -0.3, "presence_penalty": 0.9, "repetition_penalty": 0.6},
    {"min_new_tokens": 4},
    {},
)


@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_penalised_for_what_precedes_it(seed: int) -> None:
    """Rounds of a mixed batch that accept any number of drafts, among repeated tokens, after a retraction of one."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 4, (count,), generator=generator).tolist()

    requests = [request(**asked) for asked in ASKED]
    requests[0].output_ids = outputs_of_first = [1, 1, 2]
    batch = batch_of(requests, [3, 0, 5, 1, 7, 2])
    penalties = Penalties(VOCAB)
    penalties.begin(batch)
    outputs = [list(outputs_of_first), *([] for _ in ASKED[1:])]
    anchors = tokens(len(ASKED))
    for _ in range(3):
        for output, anchor in zip(outputs, anchors, strict=True):
            output.append(anchor)
        drafts = [tokens(GAMMA) for _ in ASKED]
        ids_BN = torch.tensor([[anchor, *draft] for anchor, draft in zip(anchors, drafts, strict=True)])
        logits_BNV = torch.randn(len(ASKED), GAMMA + 1, VOCAB, generator=generator)
        expected = [
            [defined(row.tolist(), output + draft[:n], asked.sampling_params) for n, row in enumerate(rows)]
            for rows, output, draft, asked in zip(logits_BNV, outputs, drafts, requests, strict=True)
        ]
        penalties.apply(batch, ids_BN, logits_BNV)
        torch.testing.assert_close(logits_BNV, torch.tensor(expected))
        accepted_B = torch.randint(0, GAMMA + 1, (len(ASKED),), generator=generator)
        anchors = tokens(len(ASKED))
        committed = torch.tensor([[*draft, 0] for draft in drafts])
        committed[torch.arange(len(ASKED)), accepted_B] = torch.tensor(anchors)
        penalties.accept(committed, accepted_B + 1)
        for output, draft, accepted in zip(outputs, drafts, accepted_B.tolist(), strict=True):
            output += draft[:accepted]


def test_a_new_request_does_not_inherit_a_place() -> None:
    penalties = Penalties(VOCAB)
    batch = batch_of([request(frequency_penalty=1.0)], [4])
    for _ in range(2):
        penalties.begin(batch)
        logits = torch.zeros(1, 1, VOCAB)
        penalties.apply(batch, torch.tensor([[2]]), logits)
        assert logits[0, 0].tolist() == [0.0, 0.0, -1.0] + [0.0] * (VOCAB - 3)


def test_logits_without_penalties_are_left_alone() -> None:
    penalties = Penalties(VOCAB)
    batch = batch_of([request()], [0])
    penalties.begin(batch)
    logits = torch.randn(1, 2, VOCAB)
    before = logits.clone()
    penalties.apply(batch, torch.tensor([[1, 2]]), logits)
    penalties.accept(torch.tensor([[2, 3]]), torch.tensor([2]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("additive", "scaling", "found"), [(None, None, False), (torch.zeros(1), None, True), (None, torch.ones(1), True)]
)
def test_penalties_are_seen_in_the_copy_for_a_forward(additive: Any, scaling: Any, found: bool) -> None:
    info = SimpleNamespace(acc_additive_penalties=additive, acc_scaling_penalties=scaling)
    assert is_asked_for(info) is found
    assert not is_asked_for(None)


def sampling(*requests: tuple[float, int, float, float]) -> Any:
    """SGLang's state for requests of (temperature, top_k, top_p, min_p); top_k VOCAB means none."""
    columns = list(zip(*requests, strict=True))
    top_ks = columns[1]
    return SimpleNamespace(
        temperatures=torch.tensor(columns[0])[:, None],
        top_ks=torch.tensor(top_ks, dtype=torch.int32),
        top_ps=torch.tensor(columns[2]),
        min_ps=torch.tensor(columns[3]),
        max_top_k=max(top_ks) if max(top_ks) < VOCAB else None,
        is_all_greedy=False,
        need_top_k_sampling=min(top_ks) < VOCAB,
        need_top_p_sampling=min(columns[2]) < 1.0,
        need_min_p_sampling=max(columns[3]) > 0.0,
    )


@pytest.mark.parametrize(
    "requests",
    [
        [(0.7, 4, 0.6, 0.0), (1.3, 3, 0.9, 0.2)],
        [(1.0, VOCAB, 1.0, 0.3), (0.5, VOCAB, 0.7, 0.05), (1.0, 1, 1.0, 0.0)],
        [(1.0, VOCAB, 1e-6, 0.0), (1.0, VOCAB, 1.0, 1.0)],
    ],
)
def test_filters_leave_what_their_definitions_leave(requests: list[tuple[float, int, float, float]]) -> None:
    rows = 3
    logits = 2 * torch.randn(len(requests) * rows, VOCAB, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    found = filtered(logits, sampling(*requests), rows=rows)
    assert torch.equal(logits, before), "logprobs are taken of them afterwards"
    for row, (logit, left) in enumerate(zip(logits, found, strict=True)):
        temperature, top_k, top_p, min_p = requests[row // rows]
        expected = sampled_distribution.kept((logit.double() / temperature).softmax(-1), top_k, top_p, min_p)
        torch.testing.assert_close((left / temperature).softmax(-1), expected.float())


@pytest.mark.parametrize(
    ("request_", "here"),
    [
        ((1.0, 4, 1.0, 0.0), False),
        ((1.0, VOCAB, 0.9, 0.0), False),
        ((1.0, 4, 0.9, 0.0), True),
        ((1.0, VOCAB, 1.0, 0.1), True),
    ],
)
def test_one_of_top_k_and_top_p_is_left_to_sglang(request_: tuple[float, int, float, float], here: bool) -> None:
    assert is_filtered_here(sampling(request_)) is here
    assert not is_filtered_here(None)
