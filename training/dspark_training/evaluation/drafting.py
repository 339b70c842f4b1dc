"""What speculative decoding asks of a drafter, and the drafters that answer.

A session is one batch under way. It is told the features of every committed position and the token that follows
each: a block drafter keeps the features as keys and values (DFlash); a chain drafter pairs feature i with token i + 1
(EAGLE-3).
"""

from __future__ import annotations

from functools import cached_property
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dspark_serving.scheduler.survival_map import SurvivalMap, draft_statistics
from dspark_training.evaluation.acceptance import Proposal, draw
from dspark_training.evaluation.slabs import Slab
from dspark_training.models.backbone import BlockDrafter
from dspark_training.models.eagle3 import Chain, Eagle3Drafter
from dspark_training.models.layers import KeysValues
from dspark_training.target import Target

Network = TypeVar("Network", BlockDrafter, Eagle3Drafter)


class DraftSession(Protocol):
    """The drafter's state of one batch."""

    def commit(self, features_BTM: Tensor, following_BT: Tensor, counts_B: Tensor) -> None:
        """Take over committed positions; row b has counts_B[b] of them, the rest is padding.

        Args:
            features_BTM: outputs of the captured layers at the positions behind what was committed before.
            following_BT: the token after each position; the last one of a row is the next anchor.
        """

    def propose(self, anchors_B: Tensor, temperature: float, uniform_BK: Tensor) -> Proposal:
        """Draft K tokens behind the anchors; greedily where the temperature is 0, else drawn with `uniform_BK`."""

    def keep(self, rows: Tensor) -> None:
        """Drop every row that is not in `rows` [kept]."""


class Drafter(Protocol):
    """Something that drafts for a target."""

    @property
    def gamma(self) -> int:
        """Drafts a round, K."""

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Target layers whose outputs it needs."""

    def begin(self, batch: int) -> DraftSession:
        """A session of that many rows."""


class NoDrafter:
    """Plain decoding: rounds of one token."""

    gamma = 0
    layer_ids = ()

    def begin(self, batch: int) -> DraftSession:
        return self

    def commit(self, features_BTM: Tensor, following_BT: Tensor, counts_B: Tensor) -> None:
        pass

    def propose(self, anchors_B: Tensor, temperature: float, uniform_BK: Tensor) -> Proposal:
        no_ids_U = anchors_B.new_empty(0)
        no_tokens_BK = anchors_B.new_empty(len(anchors_B), 0)
        return Proposal(no_tokens_BK, torch.empty(len(anchors_B), 0, 0, device=anchors_B.device), no_ids_U, None)

    def keep(self, rows: Tensor) -> None:
        pass


class _Proposer(Generic[Network]):
    """A drafter's network over its draft vocabulary.

    Args:
        model: the network, features as its target gives them (no scale).
        layer_ids: target layers whose outputs it reads.
        ids_U: token ids that it may draft, ascending.
        survival_map: judges the drafts; None: the confidence head does, if there is one.
    """

    def __init__(
        self,
        model: Network,
        target: Target,
        layer_ids: tuple[int, ...],
        ids_U: Tensor,
        survival_map: SurvivalMap | None = None,
    ) -> None:
        self.model: Network = model
        self.target, self.layer_ids, self.ids_U = target, layer_ids, ids_U
        self.survival_map = survival_map
        self.head_UD = target.lm_head_weight_VD[ids_U].float()

    @property
    def gamma(self) -> int:
        return self.model.dims.block_size


class BlockProposer(_Proposer[BlockDrafter]):
    """A block drafter (DFlash, DSpark)."""

    @cached_property
    def markov_UR(self) -> Tensor | None:
        """Output rows of the Markov head for the draft vocabulary; None without such a head."""
        head = self.model.markov_head
        return None if head is None else head.markov_w2.weight[self.ids_U].float()

    def begin(self, batch: int) -> DraftSession:
        return _BlockSession(self, batch)


class _BlockSession:
    def __init__(self, proposer: BlockProposer, batch: int) -> None:
        self._proposer, self._model = proposer, proposer.model
        self._lengths_B = torch.zeros(batch, dtype=torch.long, device=proposer.ids_U.device)
        self._slabs = [(Slab(), Slab()) for _ in self._model.layers]

    def commit(self, features_BTM: Tensor, following_BT: Tensor, counts_B: Tensor) -> None:
        new = self._model.context(features_BTM.to(self._model.norm.weight.dtype), self._lengths_B)
        for (keys, values), kv in zip(self._slabs, new, strict=True):
            keys.write(kv.keys, self._lengths_B)
            values.write(kv.values, self._lengths_B)
        self._lengths_B = self._lengths_B + counts_B

    def propose(self, anchors_B: Tensor, temperature: float, uniform_BK: Tensor) -> Proposal:
        p, model = self._proposer, self._model
        context = [KeysValues(keys.rows, values.rows) for keys, values in self._slabs]
        hidden_BAKD = model.hidden_behind(context, self._lengths_B[:, None], anchors_B[:, None], p.target.embed)
        hidden_BKD = hidden_BAKD.squeeze(1)
        logits_BKU = p.target.soft_cap(hidden_BKD.float() @ p.head_UD.T)
        picks = _Picks(p, temperature, uniform_BK)
        previous_BK = anchors_B[:, None]  # grows: x_0, x_1, ...
        for k in range(p.gamma):
            row_BU = logits_BKU[:, k]
            if model.markov_head is not None and p.markov_UR is not None:
                latent_BR = model.markov_head.latent(hidden_BKD[:, : k + 1], previous_BK)[:, -1]
                row_BU = row_BU + latent_BR.float() @ p.markov_UR.T
            previous_BK = torch.cat([previous_BK, picks.next(row_BU)[:, None]], dim=1)
        if model.confidence_head is None or p.survival_map is not None:
            return picks.proposal()
        return picks.proposal(torch.sigmoid(model.confidence(hidden_BKD, previous_BK[:, :-1]).float()))

    def keep(self, rows: Tensor) -> None:
        self._lengths_B = self._lengths_B[rows]
        for slabs in self._slabs:
            for slab in slabs:
                slab.keep(rows)


class ChainProposer(_Proposer[Eagle3Drafter]):
    """A chain drafter (EAGLE-3)."""

    def begin(self, batch: int) -> DraftSession:
        return _ChainSession(self, batch)


class _ChainSession:
    def __init__(self, proposer: ChainProposer, batch: int) -> None:
        self._proposer, self._model = proposer, proposer.model
        self._lengths_B = torch.zeros(batch, dtype=torch.long, device=proposer.ids_U.device)
        self._keys, self._values = Slab(), Slab()
        self._start_BD = proposer.head_UD.new_empty(
            batch, 0
        )  # h of the last committed row: where the next chain starts

    def commit(self, features_BTM: Tensor, following_BT: Tensor, counts_B: Tensor) -> None:
        features_BTM = features_BTM.to(self._model.norm.weight.dtype)
        new = self._model.context(features_BTM, following_BT, self._lengths_B, self._proposer.target.embed)
        self._keys.write(new.rows.keys, self._lengths_B)
        self._values.write(new.rows.values, self._lengths_B)
        self._start_BD = new.hidden_BTD[torch.arange(len(counts_B), device=counts_B.device), counts_B - 1]
        self._lengths_B = self._lengths_B + counts_B

    def propose(self, anchors_B: Tensor, temperature: float, uniform_BK: Tensor) -> Proposal:
        p = self._proposer
        context = KeysValues(self._keys.rows, self._values.rows)
        chain = Chain(self._lengths_B[:, None] - 1, self._start_BD[:, None], None)
        picks, tokens_B = _Picks(p, temperature, uniform_BK), anchors_B
        for _ in range(p.gamma):
            hidden_BAD, chain = self._model.step(context, chain, tokens_B[:, None], p.target.embed)
            tokens_B = picks.next(p.target.soft_cap(hidden_BAD[:, 0].float() @ p.head_UD.T))
        return picks.proposal()

    def keep(self, rows: Tensor) -> None:
        self._lengths_B, self._start_BD = self._lengths_B[rows], self._start_BD[rows]
        self._keys.keep(rows)
        self._values.keep(rows)


def proposer_of(
    model: BlockDrafter | Eagle3Drafter,
    target: Target,
    layer_ids: tuple[int, ...],
    ids_U: Tensor,
    survival_map: SurvivalMap | None = None,
) -> BlockProposer | ChainProposer:
    """What drafts with a network; arguments as for _Proposer."""
    if isinstance(model, Eagle3Drafter):
        return ChainProposer(model, target, layer_ids, ids_U, survival_map)
    return BlockProposer(model, target, layer_ids, ids_U, survival_map)


class _Picks:
    """The tokens of a block, one after the other, and what they were drawn from."""

    def __init__(self, proposer: BlockProposer | ChainProposer, temperature: float, uniform_BK: Tensor) -> None:
        self._ids_U, self._map = proposer.ids_U, proposer.survival_map
        self._vocab_size = proposer.target.config.vocab_size
        self._temperature, self._uniform_BK = temperature, uniform_BK
        self._tokens: list[Tensor] = []
        self._probs: list[Tensor] = []
        self._statistics: list[Tensor] = []

    def next(self, logits_BU: Tensor) -> Tensor:
        """Ids [B] of the next draft."""
        scaled_BU = logits_BU / (self._temperature or 1.0)
        if self._map is not None:  # of the distribution alone: what is drawn from it must not be told
            self._statistics.append(draft_statistics(scaled_BU, vocab_size=self._vocab_size))
        if self._temperature == 0:
            columns_B = logits_BU.argmax(-1)
        else:
            self._probs.append(torch.softmax(scaled_BU, dim=-1))
            columns_B = draw(self._probs[-1], self._uniform_BK[:, len(self._tokens)])
        self._tokens.append(self._ids_U[columns_B])
        return self._tokens[-1]

    def proposal(self, by_head_BK: Tensor | None = None) -> Proposal:
        """The block, judged by the map where there is one."""
        tokens_BK = torch.stack(self._tokens, 1)
        confidence_BK = by_head_BK
        if self._map is not None:
            heat_B = torch.full((len(tokens_BK),), self._temperature, device=tokens_BK.device)
            confidence_BK = self._map.apply(torch.stack(self._statistics, 1), heat_B)
        return Proposal(tokens_BK, torch.stack(self._probs, 1) if self._probs else None, self._ids_U, confidence_BK)
