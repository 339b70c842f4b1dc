"""Speculative decoding itself, batched and without any serving engine: draft, verify, accept, commit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_training.data.generate import Request
from dspark_training.evaluation.acceptance import Draws, Proposal, Verdict, accept_greedy, accept_sampled, draw
from dspark_training.evaluation.drafting import Drafter
from dspark_training.evaluation.slabs import TargetCache
from dspark_training.target import Target


@dataclass
class Decoded:
    """One answer and its rounds; the prefill gives its first token and counts for no round."""

    key: str
    answer_ids: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)  # drafts of each round that are in the answer, no bonus token
    verified: list[int] = field(default_factory=list)  # drafts of each round up to the answer's end
    confidence: list[list[float]] = field(default_factory=list)  # [round][K]; empty without drafts
    seconds: float = 0.0  # the batch's time shared by its requests


@torch.inference_mode()
def decode(
    target: Target, drafter: Drafter, requests: Sequence[Request], *, batch_size: int, seed: int
) -> Iterator[list[Decoded]]:
    """Answer every request, a batch at a time; requests of like length and the same temperature share a batch.

    At temperature 0 the answers are the target's own greedy ones; above, they are distributed as the target's.
    """
    ordered = sorted(requests, key=lambda r: (r.temperature, len(r.prompt_ids)))
    for _, alike in groupby(ordered, key=lambda r: r.temperature):
        group = list(alike)
        for first in range(0, len(group), batch_size):
            start = time.perf_counter()
            answers = _Batch(target, drafter, group[first : first + batch_size], seed).run()
            for answer in answers:
                answer.seconds = (time.perf_counter() - start) / len(answers)
            yield answers


class _Batch:
    """Requests under way; a finished one leaves at the end of its last round."""

    def __init__(self, target: Target, drafter: Drafter, requests: Sequence[Request], seed: int) -> None:
        self._target, self._gamma, self._layer_ids = target, drafter.gamma, drafter.layer_ids
        self._requests = requests
        self._temperature = requests[0].temperature
        self._answers = [Decoded(r.key) for r in requests]
        self._live = list(range(len(requests)))  # row -> request
        self._cache = TargetCache(target, len(requests))
        self._session = drafter.begin(len(requests))
        self._draws = Draws([_seed_of(seed, r.key) for r in requests])

    def run(self) -> list[Decoded]:
        anchors_B = self._prefill()
        while self._live:
            anchors_B = self._round(anchors_B)
        return self._answers

    def _prefill(self) -> Tensor:
        """Run the prompts; returns the first token of every answer that goes on: the first anchors."""
        lengths_B = torch.tensor([len(r.prompt_ids) for r in self._requests], device=self._cache.lengths_B.device)
        ids_BT = torch.zeros(len(lengths_B), int(lengths_B.max()), dtype=torch.long, device=lengths_B.device)
        for row, request in enumerate(self._requests):
            ids_BT[row, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids)
        last_BTD, features_BTM = self._forward(ids_BT)
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        logits_BV = self._logits(last_BTD[rows_B, lengths_B - 1])
        if self._temperature > 0:
            anchors_B = draw(torch.softmax(logits_BV / self._temperature, -1), self._draws.take(1)[:, 0])
        else:
            anchors_B = logits_BV.argmax(-1)
        following_BT = ids_BT.roll(-1, dims=1)
        following_BT[rows_B, lengths_B - 1] = anchors_B
        self._commit(features_BTM, following_BT, lengths_B)
        ended = [self._append(row, [token]) is not None for row, token in enumerate(anchors_B.tolist())]
        return anchors_B[self._leave(ended)]

    def _round(self, anchors_B: Tensor) -> Tensor:
        """One round of every live row; returns the anchors of the rows that go on."""
        uniform_BN = self._draws.take(2 * self._gamma + 1)
        proposal = self._session.propose(anchors_B, self._temperature, uniform_BN[:, : self._gamma])
        last_BJD, features_BJM = self._forward(torch.cat([anchors_B[:, None], proposal.tokens_BK], dim=1))
        logits_BJV = self._logits(last_BJD.flatten(0, 1)).unflatten(0, last_BJD.shape[:2])
        verdict = self._judge(proposal, logits_BJV, uniform_BN[:, self._gamma :])
        following_BJ = torch.cat([proposal.tokens_BK, anchors_B[:, None]], dim=1)  # the last column is a placeholder
        following_BJ.scatter_(1, verdict.accepted_B[:, None], verdict.next_B[:, None])
        self._commit(features_BJM, following_BJ, verdict.accepted_B + 1)
        return verdict.next_B[self._leave(self._record(proposal, verdict, following_BJ))]

    def _judge(self, proposal: Proposal, logits_BJV: Tensor, uniform_BJ: Tensor) -> Verdict:
        if self._temperature > 0:
            return accept_sampled(proposal, logits_BJV, self._temperature, uniform_BJ)
        return accept_greedy(proposal, logits_BJV)

    def _record(self, proposal: Proposal, verdict: Verdict, following_BJ: Tensor) -> list[bool]:
        """Add the round to the answers; True for rows whose answer is complete."""
        confidence = None if proposal.confidence_BK is None else proposal.confidence_BK.tolist()
        finished = []
        for row, (accepted, tokens) in enumerate(zip(verdict.accepted_B.tolist(), following_BJ.tolist(), strict=True)):
            answer = self._answers[self._live[row]]
            ended = self._append(row, tokens[: accepted + 1])
            finished.append(ended is not None)
            # An answer that ends within the drafts says nothing about those behind its end.
            answer.accepted.append(accepted if ended is None else min(accepted, ended))
            answer.verified.append(self._gamma if ended is None or ended > accepted else ended)
            if confidence is not None:
                answer.confidence.append(confidence[row])
        return finished

    def _append(self, row: int, tokens: list[int]) -> int | None:
        """Add tokens to a row's answer up to its end; how many were added if that is reached, else None."""
        request, answer = self._requests[self._live[row]], self._answers[self._live[row]]
        for added, token in enumerate(tokens, start=1):
            answer.answer_ids.append(token)
            if token in self._target.stop_ids or len(answer.answer_ids) >= request.max_new_tokens:
                return added
        return None

    def _leave(self, finished: Sequence[bool]) -> Tensor:
        """Drop finished rows; returns the rows that stay."""
        staying = [row for row, done in enumerate(finished) if not done]
        rows = torch.tensor(staying, dtype=torch.long, device=self._cache.lengths_B.device)
        if len(staying) < len(finished):
            self._live = [self._live[row] for row in staying]
            self._draws.keep(staying)
            if staying:
                self._cache.keep(rows)
                self._session.keep(rows)
        return rows

    def _commit(self, features_BTM: Tensor, following_BT: Tensor, counts_B: Tensor) -> None:
        self._session.commit(features_BTM, following_BT, counts_B)
        self._cache.lengths_B = self._cache.lengths_B + counts_B

    def _forward(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states [B, T, D] and features [B, T, M] of the tokens behind the committed ones."""
        count = ids_BT.shape[1]
        with self._target.capturing(self._layer_ids) as captured:
            out = self._target.decoder(
                input_ids=ids_BT,
                attention_mask=self._cache.mask(count),
                position_ids=self._cache.positions(count),
                past_key_values=self._cache.cache,
                use_cache=True,
            )
        last_BTD = out.last_hidden_state
        features = [captured[i] for i in self._layer_ids]
        return last_BTD, torch.cat(features, dim=-1) if features else last_BTD[..., :0]

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        head_VD = self._target.lm_head_weight_VD
        return self._target.soft_cap(F.linear(hidden_ND.to(head_VD.dtype), head_VD)).float()


def _seed_of(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:7], "big")
