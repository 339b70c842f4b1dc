"""A tiny target whose next token mostly follows from the last one, and drafters that know part of that.

Acceptance is then real: a drafter is right about the tokens that it knows, and has no idea of the others. All ids but a
few form one cycle, successor after successor; the target's layers disturb it, so that its text is not the cycle alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from tests.eagle3_models import make_bigram_drafter
from tests.tiny_models import VOCAB_SIZE, make_tiny_drafter, make_tiny_target

MASK = 3
_OUTSIDE = (MASK, VOCAB_SIZE - 2, VOCAB_SIZE - 1)  # never part of the cycle: mask, unknown, end of text
_SHARPNESS = 18.0
"""Logit of a token's successor, before the layers disturb it."""


class Oracle(NamedTuple):
    """What the drafters are made from."""

    config: dict[str, Any]  # the target's config.json
    successor_V: torch.Tensor  # int64; a token outside the cycle is its own
    embedding_VD: torch.Tensor  # of the target; rows of length sqrt(D)
    head_VD: torch.Tensor  # of the target: head[successor[x]] points where embedding[x] does


def make_oracle_target(path: Path, *, disturbance: float = 0.11, seed: int = 0, loop: int | None = None) -> Oracle:
    """Write a Qwen3-shaped fp32 target.

    Args:
        disturbance: standard deviation of its layers' weights.
        loop: length of its cycles; None for one of all ids.
    """
    make_tiny_target(path, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    cycle = torch.tensor([i for i in range(VOCAB_SIZE) if i not in _OUTSIDE])
    cycle = cycle[torch.randperm(len(cycle), generator=generator)]
    successor_V = torch.arange(VOCAB_SIZE)
    successor_V[cycle] = torch.cat([part.roll(-1) for part in cycle.split(loop or len(cycle))])
    model = Qwen3ForCausalLM.from_pretrained(path)
    width = model.config.hidden_size
    embedding_VD = torch.randn(VOCAB_SIZE, width, generator=generator)
    embedding_VD *= width**0.5 / embedding_VD.norm(dim=1, keepdim=True)
    embedding_VD[list(_OUTSIDE)] = 0.0
    head_VD = torch.zeros_like(embedding_VD)
    head_VD[successor_V] = embedding_VD * (_SHARPNESS / width)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() > 1:
                parameter.normal_(0.0, disturbance, generator=generator)
        model.model.embed_tokens.weight.copy_(embedding_VD)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(head_VD.clone())
    model.save_pretrained(path)
    return Oracle(json.loads((path / "config.json").read_text()), successor_V, embedding_VD, head_VD)


def known_tokens(oracle: Oracle, share: float, *, seed: int = 0) -> torch.Tensor:
    """Ids [K] of which a drafter knows the successor: a random share of the cycle."""
    generator = torch.Generator().manual_seed(seed)
    cycle = (oracle.successor_V != torch.arange(VOCAB_SIZE)).nonzero().flatten()
    return cycle[torch.rand(len(cycle), generator=generator) < share]


def make_oracle_drafter(
    path: Path, oracle: Oracle, known: torch.Tensor, *, gamma: int = 4, confidence: bool = False, sharpness: float = 1.0
) -> None:
    """Write a DSpark drafter in DeepSpec's format whose Markov head is the target's bigrams behind `known` tokens.

    Its layers say nothing of use, so behind other tokens its distribution is nearly uniform. A confidence head, if any,
    is random. With a `sharpness` below 1 it is less sure than the target.
    """
    width = oracle.config["hidden_size"]
    make_tiny_drafter(path, oracle.config, gamma=gamma, markov_rank=width, confidence=confidence)
    weights = load_file(path / "model.safetensors")
    # Small and of random sign: as it is, the anchor's embedding would lead to its successor through the head as well.
    weights["norm.weight"] = 0.02 * torch.randn(width, generator=torch.Generator().manual_seed(2))
    first_VD = torch.zeros_like(oracle.embedding_VD)
    first_VD[known] = oracle.embedding_VD[known] * sharpness
    weights["markov_head.markov_w1.weight"] = first_VD
    weights["markov_head.markov_w2.weight"] = oracle.head_VD.clone()
    save_file(weights, path / "model.safetensors")


def make_oracle_dflash(path: Path, oracle: Oracle, *, gamma: int = 4, sharpness: float = 1.0) -> None:
    """Write a DFlash drafter in DeepSpec's format that knows the successor of the anchor, and nothing of what follows.

    Its layers pass their input on: the anchor's embedding, and zeros for the mask tokens behind it.
    """
    make_tiny_drafter(path, oracle.config, gamma=gamma, markov_rank=0, confidence=False)
    weights = load_file(path / "model.safetensors")
    for name, weight in weights.items():
        weight *= 0.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
    weights["norm.weight"].fill_(sharpness)
    save_file(weights, path / "model.safetensors")


def make_oracle_eagle3(path: Path, oracle: Oracle, known: torch.Tensor) -> None:
    """Write an Eagle3 drafter that knows the successors of `known` tokens and takes every other for eight at once."""
    generator = torch.Generator().manual_seed(3)
    picked_V8 = known[torch.randint(len(known), (VOCAB_SIZE, 8), generator=generator)]
    embedding_VD = oracle.embedding_VD[picked_V8].sum(dim=1) / 8**0.5
    embedding_VD[known] = oracle.embedding_VD[known]
    make_bigram_drafter(path, oracle.config, embedding_VD=embedding_VD)
