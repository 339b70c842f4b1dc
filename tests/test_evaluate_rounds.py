"""Speculative decoding without an engine: equal to transformers, to the plain loop, to the target's distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dspark_training.bundle.export import load_bundle
from dspark_training.data.generate import Request
from dspark_training.data.store import Sample
from dspark_training.data.vocab import DraftVocab
from dspark_training.evaluation.acceptance import Draws, Proposal, accept_sampled, draw
from dspark_training.evaluation.drafting import (
    BlockProposer,
    ChainProposer,
    Drafter,
    DraftSession,
    NoDrafter,
    proposer_of,
)
from dspark_training.evaluation.rounds import Decoded, decode
from dspark_training.evaluation.walk import walk_drafter
from dspark_training.features.source import OnlineFeatures
from dspark_training.models.backbone import BlockDrafter
from dspark_training.models.eagle3 import Eagle3Drafter
from dspark_training.models.layers import DrafterDims
from dspark_training.objectives.block import BlockObjective
from dspark_training.objectives.losses import Weights
from dspark_training.target import Target
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dspark_serving.scheduler.survival_map import Line, SurvivalMap, draft_statistics
from tests.oracle import speculative_decode
from tests.oracle_drafters import known_tokens, make_oracle_drafter, make_oracle_target
from tests.sampled_distribution import chi_square, of_text
from tests.tiny_models import VOCAB_SIZE, Arch, make_tiny_drafter, make_tiny_target

PROMPTS = [[40, 41, 42, 70, 71, 40, 41, 42, 90], [50, 51], [60] * 17, [33, 34, 35, 36], [80, 81, 82]]


def proposer(root: Path, target: Target, ids: list[int] | None = None, **shape: object) -> BlockProposer:
    make_tiny_drafter(root, target.config.to_dict(), draft_vocab=ids, **shape)  # type: ignore[arg-type]
    model, spec = load_bundle(root)
    assert isinstance(model, BlockDrafter)
    return BlockProposer(model, target, spec.target_layer_ids, torch.tensor(ids or range(spec.vocab_size)))


def tiny_target(root: Path, arch: Arch = "llama") -> Target:
    make_tiny_target(root, arch)
    return Target.load(root)


def answers(target: Target, drafter: Drafter, requests: list[Request], batch_size: int = 4) -> dict[str, Decoded]:
    return {d.key: d for batch in decode(target, drafter, requests, batch_size=batch_size, seed=0) for d in batch}


def generated(target: Target, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return list(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_greedy_answers_are_those_of_transformers(tmp_path: Path, arch: Arch) -> None:
    target = tiny_target(tmp_path / "target", arch)
    drafter = proposer(tmp_path / "drafter", target)
    requests = [Request(str(i), prompt, 0.0, 20 + 9 * i) for i, prompt in enumerate(PROMPTS)]
    for found in (answers(target, drafter, requests), answers(target, NoDrafter(), requests)):
        for request in requests:
            assert found[request.key].answer_ids == generated(target, request.prompt_ids, request.max_new_tokens)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, BlockProposer]:
    """A target and a drafter that is right about some of its tokens and may draft half of the vocabulary."""
    root = tmp_path_factory.mktemp("world")
    oracle = make_oracle_target(root / "target")
    make_oracle_drafter(root / "drafter", oracle, known_tokens(oracle, 0.8), gamma=4, confidence=True)
    target = Target.load(root / "target")
    model, spec = load_bundle(root / "drafter")
    assert isinstance(model, BlockDrafter)
    head = torch.arange(VOCAB_SIZE)
    return target, BlockProposer(model, target, spec.target_layer_ids, head[head % 5 > 0])


def test_rounds_are_those_of_the_plain_loop(world: tuple[Target, BlockProposer]) -> None:
    target, drafter = world
    found = answers(target, drafter, [Request(str(i), p, 0.0, 40) for i, p in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        got = found[str(i)]
        plain = speculative_decode(drafter.model, target.model, drafter.layer_ids, prompt, 40, drafter.ids_U)
        assert got.answer_ids == plain.tokens
        assert got.accepted[:-1] == plain.accepted[:-1]
        made = 1 + sum(got.accepted[:-1]) + len(got.accepted[:-1])  # before the last round
        assert got.accepted[-1] == min(plain.accepted[-1], 40 - made)
        assert got.verified[:-1] == [4] * (len(got.accepted) - 1)
    assert len({n for d in found.values() for n in d.accepted}) > 2, "all rounds alike show little"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_survival_map_judges_in_place_of_the_head(world: tuple[Target, BlockProposer], temperature: float) -> None:
    """Confidences from the distributions that were drawn from, over the whole vocabulary; the same drafts."""
    target, headed = world
    line = Line((0.7, 0.1, -1.0), (0.3, 0.2, 0.1, 0.0))
    judge = SurvivalMap(line, line)
    mapped = proposer_of(headed.model, target, headed.layer_ids, headed.ids_U, judge)
    requests = [Request("a", PROMPTS[0], temperature, 20)]
    by_head, by_map = (answers(target, drafter, requests)["a"] for drafter in (headed, mapped))
    assert by_head.answer_ids == by_map.answer_ids
    assert by_head.confidence != by_map.confidence
    if temperature:
        return
    context = [*PROMPTS[0], by_map.answer_ids[0]]  # the first round: its anchor is the answer's first token
    ids_BT = torch.tensor([context])
    features = target.features(ids_BT, torch.ones_like(ids_BT), headed.layer_ids).context_BTM
    anchors, model = torch.tensor([[len(context) - 1]]), headed.model
    with torch.no_grad():
        hidden_BKD = model.hidden(features, anchors, ids_BT[:, -1:], target.embed)[:, 0]
        logits_V = (hidden_BKD[0, 0] @ headed.head_UD.T).float()
        if model.markov_head is not None and headed.markov_UR is not None:
            latent_BR = model.markov_head.latent(hidden_BKD[:, :1], ids_BT[:, -1:])[:, -1]
            logits_V = logits_V + latent_BR[0] @ headed.markov_UR.T
    whole_V = torch.full((target.config.vocab_size,), -torch.inf)
    whole_V[headed.ids_U] = logits_V
    expected = judge.apply(draft_statistics(whole_V)[None, None].expand(1, 4, 3), torch.zeros(1))[0, 0]
    assert by_map.confidence[0][0] == pytest.approx(float(expected), abs=1e-4)


def test_an_answer_does_not_depend_on_what_it_is_batched_with(world: tuple[Target, BlockProposer]) -> None:
    target, drafter = world
    requests = [Request(str(i), p, 0.8, 30) for i, p in enumerate(PROMPTS)]
    together, alone = answers(target, drafter, requests, 5), answers(target, drafter, requests, 1)
    assert {k: (d.answer_ids, d.accepted) for k, d in together.items()} == {
        k: (d.answer_ids, d.accepted) for k, d in alone.items()
    }


def test_the_walk_over_greedy_answers_counts_the_same_rounds(world: tuple[Target, BlockProposer]) -> None:
    target, drafter = world
    found = answers(target, drafter, [Request(str(i), p, 0.0, 60) for i, p in enumerate(PROMPTS)])
    samples = [
        Sample(str(i), "math", 0.0, p + found[str(i)].answer_ids, [(len(p), len(p) + len(found[str(i)].answer_ids))])
        for i, p in enumerate(PROMPTS)
    ]
    vocab = DraftVocab(drafter.ids_U.tolist(), VOCAB_SIZE)
    objective = BlockObjective(drafter.model, target, vocab, Weights(0.1, 0.9, 1.0), 4.0)
    walks = walk_drafter(objective, OnlineFeatures(target, drafter.layer_ids), samples)
    assert [w.accepted for w in walks] == [found[s.key].accepted for s in samples]


def test_confidences_are_those_of_the_head_behind_the_drafted_tokens(world: tuple[Target, BlockProposer]) -> None:
    target, drafter = world
    got = answers(target, drafter, [Request("a", PROMPTS[0], 0.0, 30)])["a"]
    plain = speculative_decode(drafter.model, target.model, drafter.layer_ids, PROMPTS[0], 30, drafter.ids_U)
    ids = torch.tensor([PROMPTS[0] + plain.tokens])
    features = target.features(ids, torch.ones_like(ids), drafter.layer_ids).context_BTM
    at = len(PROMPTS[0])
    for draft, accepted, confidence in zip(plain.drafts, plain.accepted, got.confidence, strict=True):
        previous = torch.tensor([[[int(ids[0, at]), *draft[:-1]]]])
        out = drafter.model(features, torch.tensor([[at]]), previous, target.embed)
        assert out.confidence_BAK is not None
        torch.testing.assert_close(torch.tensor(confidence), out.confidence_BAK[0, 0].sigmoid(), atol=1e-4, rtol=0)
        at += accepted + 1


@pytest.mark.parametrize("head", ["gated", "rnn", "none"])
def test_other_heads_draft_what_their_own_teacher_forced_rows_say(tmp_path: Path, head: str) -> None:
    """Token by token and all at once: each drafted token is the best one of its row behind the tokens before it."""
    target = tiny_target(tmp_path / "target")
    shape = {"markov_rank": 0} if head == "none" else {"markov_head_type": head}
    drafter = proposer(tmp_path / "drafter", target, confidence=False, **shape)
    ids = torch.tensor([PROMPTS[0]])
    features = target.features(ids, torch.ones_like(ids), drafter.layer_ids).context_BTM
    session = drafter.begin(1)
    session.commit(features[:, :-1], ids[:, 1:], torch.tensor([ids.shape[1] - 1]))
    proposal = session.propose(ids[:, -1], 0.0, torch.empty(1, 4))
    previous = torch.cat([ids[:, -1:], proposal.tokens_BK[:, :-1]], 1)[None]
    hidden = drafter.model.hidden(features, torch.tensor([[ids.shape[1] - 1]]), previous[..., 0], target.embed)
    logits = hidden @ target.lm_head_weight_VD.T
    if drafter.model.markov_head is not None:
        logits = logits + drafter.model.markov_head.markov_w2(drafter.model.markov_head.latent(hidden, previous))
    assert proposal.tokens_BK.tolist() == logits.argmax(-1)[0].tolist()


def test_a_chain_drafter_drafts_what_its_teacher_forced_rows_say_round_after_round(tmp_path: Path) -> None:
    target = tiny_target(tmp_path / "target")
    torch.manual_seed(5)
    dims = DrafterDims(48, 64, 1, 6, 2, 16, 1e-5, 1e4, 2, VOCAB_SIZE, 4, 0, 0, "none", confidence_head=False)
    network = Eagle3Drafter(dims)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.2)
    drafter = proposer_of(network, target, (0, 2), torch.arange(0, VOCAB_SIZE, 2))
    assert isinstance(drafter, ChainProposer)
    ids = torch.tensor([[40, 41, 42, 70, 71, 40, 41, 42, 90], [50, 51, 52, 53, 54, 55, 56, 57, 58]])
    features = target.features(ids, torch.ones_like(ids), (0, 2)).context_BTM
    session, at = drafter.begin(2), torch.zeros(2, dtype=torch.long)
    for counts in (torch.tensor([3, 4]), torch.tensor([1, 3]), torch.tensor([2, 1])):
        width = int(counts.max())
        window = (at[:, None] + torch.arange(width)).clamp_max(8)
        rows = torch.arange(2)[:, None]
        session.commit(features[rows, window], ids[rows, (window + 1).clamp_max(8)], counts)
        at = at + counts
        anchors = ids[torch.arange(2), at]
        proposal = session.propose(anchors, 0.0, torch.empty(2, 4))
        previous = torch.cat([anchors[:, None], proposal.tokens_BK[:, :-1]], 1)[:, None]
        hidden = network(features, ids.roll(-1, 1), at[:, None], previous, target.embed)[:, 0]
        best = (hidden @ target.lm_head_weight_VD[drafter.ids_U].T).argmax(-1)
        assert proposal.tokens_BK.tolist() == drafter.ids_U[best].tolist()
    session.keep(torch.tensor([1]))
    alone = session.propose(anchors[1:], 0.0, torch.empty(1, 4))
    assert alone.tokens_BK.tolist() == proposal.tokens_BK[1:].tolist()
    found = answers(target, drafter, [Request(str(i), p, 0.0, 30) for i, p in enumerate(PROMPTS)])
    assert all(found[str(i)].answer_ids == generated(target, p, 30) for i, p in enumerate(PROMPTS))


class Flattened:
    """A drafter that lies about the distribution of its drafts: what the rejection rule must not be given."""

    def __init__(self, inner: BlockProposer) -> None:
        self._inner, self.gamma, self.layer_ids = inner, inner.gamma, inner.layer_ids

    def begin(self, batch: int) -> DraftSession:
        session = self._inner.begin(batch)
        propose = session.propose

        def lying(anchors_B: torch.Tensor, temperature: float, uniform_BK: torch.Tensor) -> Proposal:
            proposal = propose(anchors_B, temperature, uniform_BK)
            assert proposal.probs_BKU is not None
            flat = proposal.probs_BKU.sqrt()
            return proposal._replace(probs_BKU=flat / flat.sum(-1, keepdim=True))

        session.propose = lying  # type: ignore[method-assign]
        return session


@pytest.mark.parametrize(("honest", "temperature"), [(True, 1.0), (True, 0.6), (False, 1.0)])
def test_sampled_texts_are_distributed_as_the_targets(tmp_path: Path, honest: bool, temperature: float) -> None:
    config = LlamaConfig(
        vocab_size=10, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=[],
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path)
    target = Target(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="dspark_gqa"), None)
    dims = DrafterDims(32, 48, 1, 2, 1, 16, 1e-6, 1e4, 2, 10, 2, 0, markov_rank=4)
    network = BlockDrafter(dims)
    drafter = BlockProposer(network, target, (0, 1), torch.tensor([0, 1, 2, 4, 5, 6, 8, 9]))
    subject: Drafter = drafter if honest else Flattened(drafter)
    requests = [Request(str(i), [1, 2, 3, 4], temperature, 3) for i in range(6000)]
    found = answers(target, subject, requests, 1000)
    assert sum(n for d in found.values() for n in d.accepted) > 400
    expected = of_text(tmp_path, [1, 2, 3, 4], 3, temperature=temperature)
    p_value = chi_square([tuple(d.answer_ids) for d in found.values()], expected)
    assert (p_value > 1e-3) if honest else (p_value < 1e-6)


def test_the_rejection_rule_gives_the_targets_distribution_by_enumeration() -> None:
    """One draft over three tokens, all uniform numbers of a fine grid: no randomness, no model."""
    ours, theirs = torch.tensor([0.5, 0.5]), torch.tensor([0.7, 0.1, 0.2])
    ids = torch.tensor([0, 1])  # token 2 is never drafted
    grid = (torch.arange(40, dtype=torch.double) + 0.5) / 40
    u_draft, u_accept, u_next = (x.flatten() for x in torch.meshgrid(grid, grid, grid, indexing="ij"))
    probs = ours.expand(len(u_draft), 1, 2)
    tokens = draw(ours.expand(len(u_draft), 2), u_draft)[:, None]
    logits = theirs.log().expand(len(u_draft), 2, 3)
    verdict = accept_sampled(Proposal(tokens, probs, ids, None), logits, 1.0, torch.stack([u_accept, u_next], 1))
    first = torch.where(verdict.accepted_B > 0, tokens[:, 0], verdict.next_B)
    torch.testing.assert_close(first.bincount() / len(first), theirs, atol=1e-3, rtol=0)
    # min(1, .7 / .5) of the half that drafts token 0, .1 / .5 of the half that drafts token 1
    assert float((verdict.accepted_B > 0).float().mean()) == pytest.approx(0.5 + 0.5 * 0.2, abs=1e-6)


def test_draws_of_a_request_are_its_own() -> None:
    both, one = Draws([3, 5]), Draws([5])
    assert torch.equal(both.take(4)[1], one.take(4)[0])
    both.keep([1])
    assert torch.equal(both.take(2), one.take(2))
