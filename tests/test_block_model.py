"""The block drafter's SGLang model where no server shows it: what an accelerator runs, in SGLang's torch stand-ins."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.speculative.dspark_components.dspark_draft import DraftNoise, draft_markov_block
from torch import nn

from dspark_serving.errors import CheckpointError
from dspark_serving.sglang_adapter import targets
from dspark_serving.sglang_adapter.models.block import DsparkServingBlockDrafter, NoMarkov, soft_capped

VOCAB, HIDDEN, GAMMA = 24, 6, 3


def drafter(**config: Any) -> DsparkServingBlockDrafter:
    """A drafter without layers, whose head is a plain embedding as Gemma's."""
    found = DsparkServingBlockDrafter.__new__(DsparkServingBlockDrafter)
    nn.Module.__init__(found)
    found.config = SimpleNamespace(vocab_size=VOCAB, hidden_size=HIDDEN, markov_rank=0, **config)
    found.fc, found.lm_head = nn.Linear(HIDDEN, HIDDEN), nn.Embedding(VOCAB, HIDDEN)
    found.markov_head, found.soft_cap, found._own, found._ids_N = NoMarkov(VOCAB), None, [], None
    return found


@torch.no_grad()
def test_sglangs_own_chain_drafts_without_a_markov_head() -> None:
    base_BGV = torch.randn(2, GAMMA, VOCAB)
    noise = DraftNoise(key=1, offset=torch.zeros(1, dtype=torch.int64))
    tokens_BG, logits_BGV = draft_markov_block(
        markov_head=NoMarkov(VOCAB),
        base_logits=base_BGV,
        anchor_tokens=torch.tensor([3, 4]),
        draft_hidden=None,
        step_temperatures=torch.zeros(2),
        noise=noise,
        tp_sync=SimpleNamespace(sync=lambda site, tensor: tensor),
    )
    assert torch.equal(tokens_BG, base_BGV.argmax(-1))
    torch.testing.assert_close(logits_BGV, base_BGV)


@torch.no_grad()
def test_a_reduced_vocabulary_leaves_nothing_else_to_draft() -> None:
    model, hidden = drafter(), torch.randn(5, HIDDEN)
    ids = torch.tensor([2, 3, 7, 20])
    model.propose_only(ids)
    logits, features = model.compute_base_logits(hidden)
    whole = hidden @ model.lm_head.weight.T
    torch.testing.assert_close(logits[:, ids], whole[:, ids])
    assert torch.equal(torch.isfinite(logits[0]).nonzero().flatten(), ids)
    assert torch.equal(features, hidden)


@torch.no_grad()
def test_an_own_head_and_markov_rows_are_spread_over_the_vocabulary() -> None:
    model, hidden, ids = drafter(), torch.randn(5, HIDDEN), torch.tensor([2, 3, 7, 20])
    model._own, model.lm_head = ["lm_head"], nn.Embedding(len(ids), HIDDEN)
    model.markov_head = nn.Module()
    model.markov_head.markov_w2 = nn.Linear(2, len(ids), bias=False)
    rows = model.markov_head.markov_w2.weight.clone()
    model.propose_only(ids)
    logits, _ = model.compute_base_logits(hidden)
    torch.testing.assert_close(logits[:, ids], hidden @ model.lm_head.weight.T)
    assert torch.equal(model.markov_head.markov_w2.weight[ids], rows)
    assert model.markov_head.markov_w2.weight.shape == (VOCAB, 2)


def test_logits_are_capped_only_where_the_config_says_so() -> None:
    logits = torch.tensor([-100.0, 0.0, 3.0])
    assert torch.equal(soft_capped(logits, None), logits)
    torch.testing.assert_close(soft_capped(logits, 8.0), torch.tensor([-8.0, 0.0, 8 * math.tanh(3 / 8)]))


class GemmaStack(nn.Module):
    """Layers that carry the residual beside their output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = torch.ones_like(x)
        for layer in self.layers:
            x, residual = layer((x + 1, residual * 2))
        return x


def test_layers_with_a_separate_residual_hand_out_their_sum() -> None:
    Gemma3ForCausalLM = type("Gemma3ForCausalLM", (nn.Module,), {})
    model = Gemma3ForCausalLM()
    model.model = GemmaStack()
    assert targets.capture_layers(model, [0, 2])
    for _ in range(2):  # nothing is left over from the pass before
        hidden, features = model.model(torch.zeros(2))
        assert hidden.tolist() == [3.0, 3.0]
        assert [feature.tolist() for feature in features] == [[3.0, 3.0], [11.0, 11.0]]
    assert model.capture_aux_hidden_states
    assert not targets.capture_layers(GemmaStack(), [0])


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Llama", "Gemma3", "Gemma4", "GptOss"])
def test_known_targets_are_accepted(name: str) -> None:
    targets.check_target({"architectures": [f"{name}ForCausalLM"]}, "somewhere")


@pytest.mark.parametrize("names", [["MambaForCausalLM"], ["NobodyKnows"], []])
def test_other_targets_are_refused_by_name(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match=names[0] if names else "no architecture"):
        targets.check_target({"architectures": names}, "somewhere")
