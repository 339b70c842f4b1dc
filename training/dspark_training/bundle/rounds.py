"""Rounds that a drafter would go through on held-out answers: what it drafts, how sure it is, what is accepted.

The answers are the target's own, so the rounds of real speculative decoding can be walked over them. Greedy answers: a
draft is accepted while it equals the text. Sampled answers: token y of the text was drawn from the target's p, and is
accepted with probability min(1, q(y) / p(y)), q the drafter's; that is a maximal coupling of p and q, so a round is
distributed as under the rejection rule, min(1, p(x) / q(x)) of a token x drawn from q. Behind a rejection the drafter
goes on with tokens of its own, as it does in serving, where the whole block is verified.

Shapes: B sequences, T tokens, A anchors a sequence, K = G drafted tokens, D hidden size, V draft vocabulary, N rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_serving.scheduler.survival_map import draft_statistics
from dspark_training.data.blocks import Blocks, Sequences, cut_blocks, pad, stack_anchors
from dspark_training.data.store import Sample
from dspark_training.data.vocab import DraftVocab
from dspark_training.evaluation.acceptance import draw
from dspark_training.evaluation.walk import walk
from dspark_training.features.source import Features, FeatureSource
from dspark_training.models.backbone import BlockDrafter
from dspark_training.models.eagle3 import Eagle3Drafter
from dspark_training.models.setup import Drafter
from dspark_training.target import Target

_GROUP = 4  # sequences in one forward of the target
_ANCHORS = 64  # of a sequence at once: bounds the logits held


class HeldOutRounds(NamedTuple):
    """One row for each round, in the order of the samples."""

    sample_N: np.ndarray  # index of its sample
    temperature_N: np.ndarray  # 0: greedy
    verify_lens_N: np.ndarray  # anchor included; shorter than the block where the answer ends
    accepted_N: np.ndarray  # accepted drafts, without the bonus token
    confidence_NG: np.ndarray | None  # of the confidence head; None without one
    statistics_NG3: np.ndarray  # of `draft_statistics`

    def rows(self, chosen_N: np.ndarray) -> HeldOutRounds:
        """Some of the rounds."""
        columns: list[Any] = [None if column is None else column[chosen_N] for column in self]
        return HeldOutRounds(*columns)


class _Drafted(NamedTuple):
    """Blocks behind every anchor."""

    accepted_BA: Tensor
    verify_lens_BA: Tensor
    confidence_BAK: Tensor | None
    statistics_BAK3: Tensor


def drawn_at(sample: Sample) -> float | None:
    """Temperature at which the answer was drawn from the target's whole distribution.

    None where that is not so, hence how often its tokens are drawn is not known: somebody else gave it, or top_p cut
    the distribution.
    """
    return None if sample.temperature and sample.top_p < 1 else sample.temperature


@torch.no_grad()
def held_out_rounds(
    target: Target,
    drafter: Drafter,
    source: FeatureSource,
    vocab: DraftVocab,
    samples: Sequence[Sample],
    *,
    seed: int = 0,
) -> HeldOutRounds:
    """Walk the rounds of a drafter over answers of its target, at the temperatures they were drawn at.

    Answers without such a temperature are left out, see `drawn_at`.

    Args:
        source: features as the drafter takes them: unscaled for a bundle, scaled for a drafter in training.
        seed: of the coin flips of sampled answers.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [(sample, heat) for sample in samples if (heat := drawn_at(sample)) is not None]
    columns: list[tuple[Any, ...]] = []
    for first in range(0, len(drawn), _GROUP):
        group, temperatures = zip(*drawn[first : first + _GROUP], strict=True)
        sequences = pad(group).to(target.device)
        features = source(sequences)
        anchors = [[p for start, end in s.spans for p in range(start, end - 1)] for s in group]
        temperature_B = torch.tensor(temperatures, device=target.device)
        chunks = [
            _draft(target, drafter, vocab, sequences, features, chunk_BA, temperature_B, generator)
            for chunk_BA in stack_anchors(anchors).to(target.device).split(_ANCHORS, dim=1)
        ]
        drafted = _Drafted(*(_joined(parts) for parts in zip(*chunks, strict=True)))
        for b, sample in enumerate(group):
            visited = _visited(sample, drafted.accepted_BA[b].tolist())
            columns.append(_row_columns(drafted, b, visited, first + b, temperatures[b]))
    whole: list[Any] = [None if parts[0] is None else np.concatenate(parts) for parts in zip(*columns, strict=True)]
    return HeldOutRounds(*whole)


def _joined(parts: Sequence[Any]) -> Any:
    """The anchors of all chunks, on the CPU."""
    return None if parts[0] is None else torch.cat(tuple(parts), 1).cpu()


def _row_columns(drafted: _Drafted, b: int, visited: list[int], sample: int, temperature: float) -> tuple[Any, ...]:
    confidence = drafted.confidence_BAK
    return (
        np.full(len(visited), sample),
        np.full(len(visited), temperature),
        drafted.verify_lens_BA[b, visited].numpy(),
        drafted.accepted_BA[b, visited].numpy(),
        None if confidence is None else confidence[b, visited].numpy(),
        drafted.statistics_BAK3[b, visited].numpy(),
    )


def _visited(sample: Sample, accepted: list[int]) -> list[int]:
    """Anchors where a round begins, as indices into the anchors of all spans."""
    visited, first = [], 0
    for start, end in sample.spans:
        count = max(0, end - 1 - start)
        rounds = walk(accepted[first : first + count]).accepted
        steps = accumulate((1 + n for n in rounds[:-1]), initial=0)
        visited += [first + at for at in steps] if rounds else []
        first += count
    return visited


def _draft(
    target: Target,
    drafter: Drafter,
    vocab: DraftVocab,
    sequences: Sequences,
    features: Features,
    anchors_BA: Tensor,
    temperature_B: Tensor,
    generator: torch.Generator,
) -> _Drafted:
    """Draft behind every anchor, along the text as far as it is accepted."""
    blocks = cut_blocks(sequences, anchors_BA, drafter.dims.block_size)
    drafting = _drafting(drafter, target, vocab, sequences, features, blocks)
    heat_BA = temperature_B[:, None].expand(anchors_BA.shape)
    alive_BA = torch.ones_like(anchors_BA, dtype=torch.bool)
    ids_BA = blocks.previous_BAK[..., 0]
    accepts, statistics = [], []
    for k in range(drafter.dims.block_size):
        logits_BAV = drafting.step(ids_BA).float()
        statistics.append(_statistics(logits_BAV, heat_BA, target.config.vocab_size))
        label_BA = blocks.labels_BAK[..., k]
        own_BA = vocab.ids_V[logits_BAV.argmax(-1)]
        accept_BA = own_BA == label_BA
        hot_BA = heat_BA > 0
        if hot_BA.any():
            hidden_ND = _last_hidden(features, blocks, k)[hot_BA]
            accept_BA[hot_BA], own_BA[hot_BA] = _sampled(
                target, vocab, logits_BAV[hot_BA], hidden_ND, label_BA[hot_BA], alive_BA[hot_BA], heat_BA[hot_BA],
                generator,
            )  # fmt: skip
        alive_BA = alive_BA & accept_BA
        accepts.append(alive_BA)
        ids_BA = own_BA
    accepted_BA = (torch.stack(accepts, -1) & blocks.valid_BAK).long().sum(-1)
    verify_lens_BA = 1 + blocks.valid_BAK.long().sum(-1)
    return _Drafted(accepted_BA, verify_lens_BA, drafting.confidence(), torch.stack(statistics, -2))


def _drafting(
    drafter: Drafter, target: Target, vocab: DraftVocab, sequences: Sequences, features: Features, blocks: Blocks
) -> _BlockDrafting | _ChainDrafting:
    context_BTM = features.context_BTM.to(drafter.norm.weight.dtype)
    if isinstance(drafter, Eagle3Drafter):
        return _ChainDrafting(drafter, target, vocab, sequences, context_BTM, blocks)
    return _BlockDrafting(drafter, target, vocab, context_BTM, blocks)


class _BlockDrafting:
    """A block drafter, token by token: the backbone ran once, the Markov head follows the tokens."""

    def __init__(
        self, drafter: BlockDrafter, target: Target, vocab: DraftVocab, context_BTM: Tensor, blocks: Blocks
    ) -> None:
        self._drafter, self._target, self._vocab = drafter, target, vocab
        self._head_VD = target.lm_head_weight_VD[vocab.ids_V].to(context_BTM.dtype)
        anchor_ids_BA = blocks.previous_BAK[..., 0]
        self._hidden_BAKD = drafter.hidden(context_BTM, blocks.anchors_BA, anchor_ids_BA, target.embed)
        self._previous: list[Tensor] = []

    def step(self, ids_BA: Tensor) -> Tensor:
        """Draft logits [B, A, V] behind these tokens."""
        self._previous.append(ids_BA)
        rows, markov = len(self._previous), self._drafter.markov_head
        logits_BAV = self._target.soft_cap(self._hidden_BAKD[..., rows - 1, :] @ self._head_VD.T)
        if markov is None:
            return logits_BAV
        latent_BAR = markov.latent(self._hidden_BAKD[..., :rows, :], torch.stack(self._previous, -1))[..., -1, :]
        return logits_BAV + latent_BAR @ markov.markov_w2.weight[self._vocab.ids_V].T

    def confidence(self) -> Tensor | None:
        """Probabilities [B, A, K], once all is drafted."""
        if self._drafter.confidence_head is None:
            return None
        return self._drafter.confidence(self._hidden_BAKD, torch.stack(self._previous, -1)).float().sigmoid()


class _ChainDrafting:
    """An Eagle3 drafter: a step of its chain for each token."""

    def __init__(
        self,
        drafter: Eagle3Drafter,
        target: Target,
        vocab: DraftVocab,
        sequences: Sequences,
        context_BTM: Tensor,
        blocks: Blocks,
    ) -> None:
        self._drafter, self._target = drafter, target
        self._head_VD = target.lm_head_weight_VD[vocab.ids_V].to(context_BTM.dtype)
        first_B = torch.zeros(len(context_BTM), dtype=torch.long, device=context_BTM.device)
        self._context = drafter.context(context_BTM, sequences.ids_BT.roll(-1, dims=1), first_B, target.embed)
        self._chain = drafter.begin(self._context, blocks.anchors_BA)

    def step(self, ids_BA: Tensor) -> Tensor:
        """Draft logits [B, A, V] behind these tokens."""
        hidden_BAD, self._chain = self._drafter.step(self._context.rows, self._chain, ids_BA, self._target.embed)
        return self._target.soft_cap(hidden_BAD @ self._head_VD.T)

    def confidence(self) -> Tensor | None:
        """None: there is no head."""
        return None


def _last_hidden(features: Features, blocks: Blocks, k: int) -> Tensor:
    """Input [B, A, D] of the target's head for the token that row k drafts."""
    positions_BA = (blocks.anchors_BA + k).clamp_max(features.last_BTD.shape[1] - 1)
    return features.last_BTD[torch.arange(len(positions_BA), device=positions_BA.device)[:, None], positions_BA]


def _sampled(
    target: Target,
    vocab: DraftVocab,
    logits_NV: Tensor,
    hidden_ND: Tensor,
    label_N: Tensor,
    alive_N: Tensor,
    temperature_N: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Whether the text's token is accepted, and the drafted token: the text's, or one of the drafter's own."""
    q_NV = torch.softmax(logits_NV / temperature_N[:, None], -1)
    target_logits = target.soft_cap(F.linear(hidden_ND, target.lm_head_weight_VD)).float()
    p_NT = torch.softmax(target_logits / temperature_N[:, None], -1)
    column_N = vocab.columns_T[label_N]
    q_label_N = q_NV.gather(-1, column_N.clamp_min(0)[:, None])[:, 0] * (column_N >= 0)
    p_label_N = p_NT.gather(-1, label_N[:, None])[:, 0]
    accept_N = torch.rand(len(label_N), generator=generator).to(p_label_N.device) * p_label_N < q_label_N
    # A rejected draft is distributed as q beyond p; behind a rejection drafts are the drafter's, whatever p.
    beyond_NV = (q_NV - p_NT[:, vocab.ids_V]).clamp_min(0.0)
    usable_N = alive_N & (beyond_NV.sum(-1) > 0)
    weights_NV = torch.where(usable_N[:, None], beyond_NV, q_NV)
    own_N = draw(weights_NV, torch.rand(len(label_N), generator=generator))
    return accept_N, torch.where(accept_N & alive_N, label_N, vocab.ids_V[own_N])


def _statistics(logits_BAV: Tensor, heat_BA: Tensor, vocab_size: int) -> Tensor:
    """`draft_statistics` [B, A, 3] as serving sees them: at the request's temperature, over the whole vocabulary."""
    scale_BA = torch.where(heat_BA > 0, heat_BA, 1.0)
    return draft_statistics(logits_BAV / scale_BA[..., None], vocab_size=vocab_size)
