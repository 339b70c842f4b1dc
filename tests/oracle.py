"""The reference that everything is compared with: greedy speculative decoding, written out, over plain models."""

from __future__ import annotations

from typing import NamedTuple

import torch
from dspark_training.models.backbone import BlockDrafter
from torch import Tensor
from transformers import PreTrainedModel


class Decoded(NamedTuple):
    tokens: list[int]  # everything after the prompt
    drafts: list[list[int]]  # one block a round
    accepted: list[int]  # accepted drafts of each round, without the bonus token


@torch.no_grad()
def draft_block(
    drafter: BlockDrafter, target: PreTrainedModel, features_1TM: Tensor, anchor_id: int, allowed: Tensor | None = None
) -> list[int]:
    """Greedy block behind the anchor, token by token; `features_1TM` covers exactly the tokens before the anchor."""
    anchors = torch.tensor([[features_1TM.shape[1]]])
    padded = torch.cat([features_1TM, torch.zeros_like(features_1TM[:, :1])], dim=1)
    hidden = drafter.hidden(padded, anchors, torch.tensor([[anchor_id]]), target.get_input_embeddings())[0, 0]
    head = target.get_output_embeddings().weight.float()
    tokens, previous = [], anchor_id
    for row in hidden:
        logits = head @ row
        if drafter.markov_head is not None:
            logits += drafter.markov_head.markov_w2.weight @ drafter.markov_head.markov_w1.weight[previous]
        if allowed is not None:
            outside = torch.ones_like(logits, dtype=torch.bool)
            outside[allowed] = False
            logits = logits.masked_fill(outside, float("-inf"))
        previous = int(logits.argmax())
        tokens.append(previous)
    return tokens


@torch.no_grad()
def speculative_decode(
    drafter: BlockDrafter,
    target: PreTrainedModel,
    layer_ids: tuple[int, ...],
    prompt: list[int],
    max_new_tokens: int,
    allowed: Tensor | None = None,
) -> Decoded:
    """Draft, verify, accept, commit, with no cache of any kind."""

    def run(ids: list[int]) -> tuple[Tensor, Tensor]:
        out = target(torch.tensor([ids]), output_hidden_states=True)
        features = torch.cat([out.hidden_states[i + 1] for i in layer_ids], dim=-1)
        return out.logits[0].argmax(-1), features.float()

    ids = [*prompt, int(run(prompt)[0][-1])]  # prefill draws the first anchor
    decoded = Decoded([ids[-1]], [], [])
    while len(decoded.tokens) < max_new_tokens:
        draft = draft_block(drafter, target, run(ids)[1][:, :-1], ids[-1], allowed)
        best = run(ids + draft)[0][len(ids) - 1 :].tolist()  # best[k] is the target's token in place of draft[k]
        accepted = next((k for k, token in enumerate(draft) if token != best[k]), len(draft))
        ids += [*draft[:accepted], best[accepted]]
        decoded.tokens.extend(ids[len(prompt) + len(decoded.tokens) :])
        decoded.drafts.append(draft)
        decoded.accepted.append(accepted)
    return decoded._replace(tokens=decoded.tokens[:max_new_tokens])
