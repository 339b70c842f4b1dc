"""Drafting and rejection on CPU: against a plain loop, and by the frequencies of what they emit."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.speculative.dspark_components.dspark_draft import DraftBlockProposer, DraftBlockResult, DraftProposal
from torch import nn

from dspark_serving.scheduler.baselines import FullPolicy
from dspark_serving.scheduler.round import Batch
from dspark_serving.scheduler.survival_map import SurvivalMap, draft_statistics
from dspark_serving.sglang_adapter.cpu.drafting import DraftChain
from dspark_serving.sglang_adapter.cpu.sampling import chain_speculative_sampling
from dspark_serving.sglang_adapter.draws import Chain
from dspark_serving.sglang_adapter.proposer import PolicyProposer


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def accept_chain(
    candidates: torch.Tensor, target: torch.Tensor, draft: torch.Tensor, uniform: torch.Tensor, final: torch.Tensor
) -> tuple[list[int], torch.Tensor]:
    """The rejection rule under test, called as SGLang calls it; returns counts and the token after each row."""
    requests, width = candidates.shape
    index = torch.arange(requests * width).view(requests, width)
    predicts, accepted = torch.full((requests * width,), -1), torch.full((requests, width), -1)
    counts = torch.zeros(requests, dtype=torch.int32)
    chain_speculative_sampling(
        predicts, accepted, counts, candidates, index, index, index, uniform, final, target, draft, 1.0, 1.0, True
    )
    for request, count in enumerate(counts.tolist()):
        assert accepted[request, : count + 1].tolist() == index[request, : count + 1].tolist()
    return counts.tolist(), predicts.view(requests, width)


def test_rejection_keeps_the_target_distribution() -> None:
    """Frequencies of the first two emitted tokens equal the target's joint distribution (chi-square)."""
    trials, vocab = 40_000, 3
    target = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
    draft = torch.tensor([[0.2, 0.5, 0.3], [0.5, 0.4, 0.1]])
    first = torch.multinomial(draft[0], trials, replacement=True)
    second = torch.multinomial(draft[1], trials, replacement=True)
    candidates = torch.stack([torch.zeros(trials, dtype=torch.long), first, second], dim=1)
    counts, following = accept_chain(
        candidates,
        target.expand(trials, 3, vocab).contiguous(),
        draft.expand(trials, 2, vocab).contiguous(),
        torch.rand(trials, 2),
        torch.rand(trials),
    )
    observed = torch.bincount(following[:, 0], minlength=vocab).double()
    expected = target[0].double() * trials
    assert float(((observed - expected) ** 2 / expected).sum()) < 13.8  # p = 0.001 with two degrees of freedom
    went_on = torch.tensor(counts) >= 1
    observed = torch.bincount(following[went_on, 1], minlength=vocab).double()
    expected = target[1].double() * int(went_on.sum())
    assert float(((observed - expected) ** 2 / expected).sum()) < 13.8


def test_rejection_against_the_wrong_distribution_is_noticed() -> None:
    """Negative control of the test above: rejecting with other probabilities than were drawn from shows."""
    trials = 40_000
    target, sampled, claimed = torch.tensor([0.6, 0.4]), torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.5])
    drafts = torch.multinomial(sampled, trials, replacement=True)
    candidates = torch.stack([torch.zeros(trials, dtype=torch.long), drafts], dim=1)
    _, following = accept_chain(
        candidates,
        target.expand(trials, 2, 2).contiguous(),
        claimed.expand(trials, 1, 2).contiguous(),
        torch.rand(trials, 1),
        torch.rand(trials),
    )
    observed = torch.bincount(following[:, 0], minlength=2).double()
    expected = target.double() * trials
    assert float(((observed - expected) ** 2 / expected).sum()) > 100.0


def test_rejection_never_emits_an_impossible_token() -> None:
    target = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    draft = torch.tensor([[[0.5, 0.5, 0.0]]])
    for uniform, final in ((0.0, 1.0), (0.999, 0.999999), (0.5, 0.0)):
        _, following = accept_chain(
            torch.tensor([[0, 1]]), target, draft, torch.tensor([[uniform]]), torch.tensor([final])
        )
        assert target[0, 1, following[0, 1]] > 0


class Markov(nn.Module):
    """The vanilla head as SGLang's module offers it."""

    def __init__(self, vocab: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab, rank)
        self.markov_w2 = nn.Linear(rank, vocab, bias=False)

    def init_state(self, hidden_states: torch.Tensor) -> None:
        return None

    def step_bias(self, previous: torch.Tensor, *, hidden_states: Any, state: Any) -> tuple[torch.Tensor, None]:
        return self.markov_w2(self.markov_w1(previous)), None


VOCAB, HIDDEN, GAMMA = 30, 12, 4


@pytest.mark.parametrize("ids", [None, [1, 4, 5, 9, 20, 29]], ids=["whole", "reduced"])
@torch.no_grad()
def test_greedy_chain_equals_a_plain_loop(ids: list[int] | None) -> None:
    head, markov = torch.randn(VOCAB, HIDDEN), Markov(VOCAB, 5)
    w1, w2 = markov.markov_w1.weight.clone(), markov.markov_w2.weight.clone()
    chain = DraftChain(head, markov, VOCAB, None if ids is None else torch.tensor(ids))
    hidden, anchors = torch.randn(3, GAMMA, HIDDEN), torch.tensor([2, 7, 11])
    found = chain.draft(hidden, anchors, torch.ones(3), torch.ones(3, dtype=torch.bool))
    allowed = torch.full((VOCAB,), -math.inf)
    allowed[ids if ids is not None else slice(None)] = 0.0
    for request in range(3):
        token = int(anchors[request])
        for step in range(GAMMA):
            logits = head @ hidden[request, step] + w2 @ w1[token] + allowed
            token = int(logits.argmax())
            assert int(found.tokens_BG[request, step]) == token
    assert found.probs_BGV is None


@pytest.mark.parametrize("cap", [None, 2.0])
@torch.no_grad()
def test_without_a_markov_head_every_row_stands_alone(cap: float | None) -> None:
    ids = torch.tensor([1, 4, 5, 9, 20, 29])
    head = torch.randn(len(ids), HIDDEN)  # the drafter's own, with a row for each id
    chain = DraftChain(head, None, VOCAB, ids, soft_cap=cap)
    hidden = torch.randn(3, GAMMA, HIDDEN)
    greedy = torch.tensor([True, False, True])
    found = chain.draft(hidden, torch.zeros(3, dtype=torch.long), torch.full((3,), 0.7), greedy)
    assert found.probs_BGV is not None
    for request in range(3):
        for step in range(GAMMA):
            logits = head @ hidden[request, step]
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            if greedy[request]:
                assert int(found.tokens_BG[request, step]) == int(ids[logits.argmax()])
            else:
                torch.testing.assert_close(found.probs_BGV[request, step, ids], (logits / 0.7).softmax(0))
    assert float(found.probs_BGV.sum(2).sub(1).abs().max()) < 1e-5


@pytest.mark.parametrize("markov", [Markov(VOCAB, 5), None], ids=["markov", "none"])
@torch.no_grad()
def test_sampled_chain_draws_from_the_probabilities_that_it_reports(markov: nn.Module | None) -> None:
    ids = torch.tensor([1, 4, 5, 9])
    chain = DraftChain(torch.randn(VOCAB, HIDDEN), markov, VOCAB, ids)
    requests = 20_000
    hidden = torch.randn(1, 1, HIDDEN).expand(requests, 1, HIDDEN)
    anchors = torch.full((requests,), 3)
    greedy = torch.zeros(requests, dtype=torch.bool)
    greedy[0] = True
    found = chain.draft(hidden, anchors, torch.full((requests,), 2.0), greedy)
    assert found.probs_BGV is not None
    probs = found.probs_BGV[1, 0]
    assert probs.shape == (VOCAB,)
    assert set(probs.nonzero().flatten().tolist()) == set(ids.tolist())
    observed = torch.bincount(found.tokens_BG[1:, 0], minlength=VOCAB)[ids].double()
    expected = probs[ids].double() * (requests - 1)
    assert float(((observed - expected) ** 2 / expected).sum()) < 16.3  # p = 0.001 with three degrees of freedom
    assert int(found.tokens_BG[0, 0]) == int(probs.argmax())


@torch.no_grad()
def judged_chain(greedy_R: torch.Tensor, temperature_R: torch.Tensor) -> tuple[Chain, torch.Tensor, torch.Tensor]:
    """Many requests with the same hidden rows and anchor, drafted with statistics; and the head's parts."""
    head, markov = torch.randn(VOCAB, HIDDEN), Markov(VOCAB, 5)
    hidden = torch.randn(1, GAMMA, HIDDEN).expand(len(greedy_R), GAMMA, HIDDEN)
    chain = DraftChain(head, markov, VOCAB, None, judged=True)
    found = chain.draft(hidden, torch.full((len(greedy_R),), 3), temperature_R, greedy_R)
    return found, hidden @ head.T, markov.markov_w1.weight @ markov.markov_w2.weight.T


def test_statistics_are_those_of_the_distributions_drawn_from() -> None:
    greedy_R = torch.arange(200) < 50
    temperature_R = torch.where(torch.arange(200) % 2 == 0, 0.6, 1.4)
    found, base_RGV, bias_VV = judged_chain(greedy_R, temperature_R)
    assert found.statistics_BG3 is not None
    before_RG = torch.cat([torch.full((200, 1), 3), found.tokens_BG[:, :-1]], dim=1)
    divisor_R = torch.where(greedy_R, 1.0, temperature_R)  # a greedy request draws at no temperature
    expected = draft_statistics((base_RGV + bias_VV[before_RG]) / divisor_R[:, None, None])
    assert torch.allclose(found.statistics_BG3, expected, atol=1e-3)


@torch.no_grad()
def test_statistics_of_a_reduced_vocabulary_are_those_of_the_whole_one_that_holds_nothing_else() -> None:
    head, hidden, ids = torch.randn(VOCAB, HIDDEN), torch.randn(2, GAMMA, HIDDEN), torch.tensor([1, 4, 5, 9])
    chain = DraftChain(head, None, VOCAB, ids, judged=True)
    found = chain.draft(hidden, torch.full((2,), 3), torch.ones(2), torch.ones(2, dtype=torch.bool))
    whole_BGV = torch.full((2, GAMMA, VOCAB), -torch.inf)
    whole_BGV[..., ids] = hidden @ head[ids].T
    assert found.statistics_BG3 is not None
    torch.testing.assert_close(found.statistics_BG3, draft_statistics(whole_BGV), atol=1e-4, rtol=1e-4)


def test_statistics_know_the_tokens_before_and_not_the_one_that_is_drawn() -> None:
    requests = 500
    found, *_ = judged_chain(torch.zeros(requests, dtype=torch.bool), torch.full((requests,), 1.5))
    assert found.statistics_BG3 is not None
    assert len(found.tokens_BG[:, 0].unique()) > 5, "the control: different tokens were drawn"
    for step in range(GAMMA):
        seen: dict[tuple[int, ...], torch.Tensor] = {}
        for tokens, statistics in zip(found.tokens_BG[:, :step].tolist(), found.statistics_BG3[:, step], strict=True):
            assert torch.allclose(seen.setdefault(tuple(tokens), statistics), statistics, atol=1e-4)
    assert found.statistics_BG3[:, 1].std(dim=0).min() > 0.01, "the control: they do depend on the token before"


def test_all_greedy_requests_are_judged_alike_in_any_company() -> None:
    torch.manual_seed(3)
    alone, *_ = judged_chain(torch.ones(2, dtype=torch.bool), torch.full((2,), 0.3))
    torch.manual_seed(3)
    mixed, *_ = judged_chain(torch.tensor([True, False]), torch.full((2,), 0.3))
    assert alone.statistics_BG3 is not None
    assert mixed.statistics_BG3 is not None
    assert torch.allclose(alone.statistics_BG3[0], mixed.statistics_BG3[0], atol=1e-5)
    assert not torch.allclose(alone.statistics_BG3[1], mixed.statistics_BG3[1], atol=1e-2)


def native_proposer(**parts: Any) -> PolicyProposer:
    """The proposer of a machine with an accelerator, as far as confidences go."""
    found = PolicyProposer.__new__(PolicyProposer)
    found.draft_model = SimpleNamespace(confidence_head=None)
    found._greedy_draft, found._draft_sampler = False, None
    found.survival_map = SurvivalMap.default(GAMMA)
    for name, part in parts.items():
        setattr(found, name, part)
    return found


@pytest.mark.parametrize("head", [None, nn.Identity()], ids=["no head", "a head that a map replaces"])
def test_blocks_that_sglang_drafts_are_judged_as_those_of_the_chain(
    monkeypatch: pytest.MonkeyPatch, head: nn.Module | None
) -> None:
    greedy_R, temperature_R = torch.tensor([True, False, False]), torch.tensor([0.4, 0.6, 1.4])
    found, base_RGV, bias_VV = judged_chain(greedy_R, temperature_R)
    before_RG = torch.cat([torch.full((3, 1), 3), found.tokens_BG[:, :-1]], dim=1)
    block = DraftBlockResult(
        draft_tokens=found.tokens_BG,
        corrected_logits=base_RGV + bias_VV[before_RG],
        greedy_mask=greedy_R,
        temperatures=temperature_R,
        greedy_draft=False,
    )
    by_head_RG = None if head is None else torch.full((3, GAMMA), 0.5)
    proposal = DraftProposal(draft_block_ids=before_RG, draft_block=block, confidence=by_head_RG)
    monkeypatch.setattr(DraftBlockProposer, "propose", lambda self, **kwargs: proposal)
    plan = FullPolicy().plan(Batch.ordinary(np.arange(3), np.arange(3)))
    ours = native_proposer(plan=plan, draft_model=SimpleNamespace(confidence_head=head))
    confidence_RG = ours.propose().confidence
    step_temperature_R = torch.where(greedy_R, 0.0, temperature_R)
    assert found.statistics_BG3 is not None
    expected_RG = SurvivalMap.default(GAMMA).apply(found.statistics_BG3, step_temperature_R)
    assert torch.allclose(confidence_RG, expected_RG, atol=1e-3)
    ours._greedy_draft = True  # SGLang keeps no distributions: what the head says stands
    assert ours.propose().confidence is by_head_RG


@pytest.mark.parametrize(
    ("parts", "judges"),
    [
        ({}, True),
        ({"survival_map": None}, False),
        ({"_greedy_draft": True}, False),
        ({"_draft_sampler": SimpleNamespace(_megakernel_steps=None)}, True),
        ({"_draft_sampler": SimpleNamespace(_megakernel_steps=lambda bs: None)}, False),
        ({"_greedy_draft": True, "draft_model": SimpleNamespace(confidence_head=nn.Identity())}, True),
    ],
    ids=["eager", "static", "greedy draft", "folded", "megakernel", "a head"],
)
def test_no_confidences_where_sglang_keeps_no_draft_distributions(parts: dict[str, Any], judges: bool) -> None:
    assert native_proposer(**parts).judges == judges
