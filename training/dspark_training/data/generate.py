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
    stop_ids = target.stop_ids
    temperatures_B = torch.tensor([r.temperature for r in requests], device=target.device)
    answers: list[list[int]] = [[] for _ in requests]
    live = list(range(len(requests)))  # row -> request
    finished = [False] * len(requests)  # by row
    cache = target.new_cache()
    input_ids_BT, mask_BT = (part.to(target.device) for part in _left_pad([r.prompt_ids for r in requests]))
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
        tokens_B = _sample(logits_BV.float(), temperatures_B, generator)
        for row, token in enumerate(tokens_B.tolist()):
            if not finished[row]:
                answer = answers[live[row]]
                answer.append(token)
                finished[row] = token in stop_ids or len(answer) >= requests[live[row]].max_new_tokens
        going = [row for row, done in enumerate(finished) if not done]
        if not going:
            break
        if len(going) < _COMPACT_BELOW * len(finished):
            live, finished = [live[row] for row in going], [False] * len(going)
            rows = torch.tensor(going, device=target.device)
            tokens_B, mask_BT, temperatures_B = tokens_B[rows], mask_BT[rows], temperatures_B[rows]
            for layer in cache.layers:
                if isinstance(layer, SlabLayer):
                    layer.keep_rows(rows)
        input_ids_BT = tokens_B[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
    return [Completion(r.key, ids, stopped=ids[-1] in stop_ids) for r, ids in zip(requests, answers, strict=True)]


def _left_pad(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    return ids_BT, mask_BT


def _sample(logits_BV: Tensor, temperatures_B: Tensor, generator: torch.Generator) -> Tensor:
    """Greedy where the temperature is 0, else a draw from softmax(logits / T); returns [B]. `generator` is a CPU's."""
    tokens_B = logits_BV.argmax(-1)
    hot = temperatures_B > 0
    if hot.any():
        # Inverse of the distribution function: torch.multinomial takes longer than the target's forward here.
        cumulative_BV = torch.softmax(logits_BV[hot] / temperatures_B[hot, None], dim=-1).cumsum(-1)
        draws_B1 = (
            torch.rand(len(cumulative_BV), 1, generator=generator).to(cumulative_BV.device) * cumulative_BV[:, -1:]
        )
        tokens_B[hot] = torch.searchsorted(cumulative_BV, draws_B1, right=True)[:, 0].clamp_max(logits_BV.shape[1] - 1)
    return tokens_B
