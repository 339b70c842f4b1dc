"""Batched generation by the target itself: answers to train on, and prompts where the user has none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_training.target import SlabLayer, Target

_COMPACT_BELOW = 0.75  # share of live rows under which finished rows leave the batch


class Request(NamedTuple):
    """One sequence to continue."""

    key: str  # names the result
    prompt_ids: list[int]
    temperature: float  # 0 is greedy
    max_new_tokens: int


class Completion(NamedTuple):
    key: str
    answer_ids: list[int]  # ends with the stop token if one was drawn
    stopped: bool  # False: cut at max_new_tokens


@torch.inference_mode()
def complete(
    target: Target, requests: Sequence[Request], *, batch_size: int, generator: torch.Generator
) -> Iterator[list[Completion]]:
    """Continue every request, a batch at a time; yields the completions of each batch.

    Requests are batched in order of prompt length, so that little is padded.
    """
    ordered = sorted(requests, key=lambda r: (r.max_new_tokens, len(r.prompt_ids)))
    for start in range(0, len(ordered), batch_size):
        yield _complete_batch(target, ordered[start : start + batch_size], generator)


def _complete_batch(target: Target, requests: Sequence[Request], generator: torch.Generator) -> list[Completion]:
    stop_ids = torch.tensor(sorted(target.stop_ids))
    limits_B = torch.tensor([r.max_new_tokens for r in requests])
    temperatures_B = torch.tensor([r.temperature for r in requests])
    answers: list[list[int]] = [[] for _ in requests]
    live_B = torch.arange(len(requests))  # row -> request
    cache = target.new_cache()
    input_ids_BT, mask_BT = _left_pad([r.prompt_ids for r in requests])
    finished_B = torch.zeros(len(requests), dtype=torch.bool)
    while True:
        out = target.model.base_model(
            input_ids=input_ids_BT,
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(1) - 1).clamp_min(0)[:, -input_ids_BT.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        # Two-dimensional: a batched product would copy the head's weight once a row.
        logits_BV = target.soft_cap(F.linear(out.last_hidden_state[:, -1].contiguous(), target.lm_head_weight_VD))
        tokens_B = _sample(logits_BV.float(), temperatures_B[live_B], generator)
        for row, token in enumerate(tokens_B.tolist()):
            if not finished_B[row]:
                answers[live_B[row]].append(token)
        lengths_B = torch.tensor([len(answers[i]) for i in live_B.tolist()])
        finished_B |= torch.isin(tokens_B, stop_ids) | (lengths_B >= limits_B[live_B])
        if finished_B.all():
            break
        if (~finished_B).sum() < _COMPACT_BELOW * len(finished_B):
            rows = (~finished_B).nonzero()[:, 0]
            live_B, tokens_B, mask_BT, finished_B = live_B[rows], tokens_B[rows], mask_BT[rows], finished_B[rows]
            for layer in cache.layers:
                if isinstance(layer, SlabLayer):
                    layer.keep_rows(rows)
        input_ids_BT = tokens_B[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
    return [
        Completion(r.key, ids, stopped=ids[-1] in target.stop_ids) for r, ids in zip(requests, answers, strict=True)
    ]


def _left_pad(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    return ids_BT, mask_BT


def _sample(logits_BV: Tensor, temperatures_B: Tensor, generator: torch.Generator) -> Tensor:
    """Greedy where the temperature is 0, else a draw from softmax(logits / T); returns [B]."""
    tokens_B = logits_BV.argmax(-1)
    hot = temperatures_B > 0
    if hot.any():
        # Inverse of the distribution function: torch.multinomial takes longer than the target's forward here.
        cumulative_BV = torch.softmax(logits_BV[hot] / temperatures_B[hot, None], dim=-1).cumsum(-1)
        draws_B1 = torch.rand(len(cumulative_BV), 1, generator=generator) * cumulative_BV[:, -1:]
        tokens_B[hot] = torch.searchsorted(cumulative_BV, draws_B1, right=True)[:, 0].clamp_max(logits_BV.shape[1] - 1)
    return tokens_B
