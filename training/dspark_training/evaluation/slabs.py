"""Key/value caches of batches whose rows have different lengths: entry s of a row is always position s.

Rounds accept different numbers of drafts in each row. What was written behind a row's length is never looked at and
is overwritten by the next round, so that nothing has to be cut or moved.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from dspark_training.target import Target

_STEP = 128  # entries added at a time


class Slab:
    """Rows [B, G, S, E] that grow; G heads of width E."""

    def __init__(self) -> None:
        self._slab: Tensor | None = None
        self._end = 0

    @property
    def rows(self) -> Tensor:
        """[B, G, up to the furthest entry, E].

        Raises:
            ValueError: nothing was written yet.
        """
        if self._slab is None:
            raise ValueError("an empty slab has no rows")
        return self._slab[:, :, : self._end]

    def write(self, new_BGTE: Tensor, first_B: Tensor) -> Tensor:
        """Put entries at first_B[b], first_B[b] + 1, ... of row b; returns `rows` up to the furthest of them."""
        batch, heads, count, width = new_BGTE.shape
        self._end = int(first_B.max()) + count
        if self._slab is None or self._end > self._slab.shape[2]:
            # Zeros, not empty: what a mask hides still enters a product, and 0 * NaN is NaN.
            grown = new_BGTE.new_zeros(batch, heads, self._end + _STEP, width)
            if self._slab is not None:
                grown[:, :, : self._slab.shape[2]] = self._slab
            self._slab = grown
        positions_BT = first_B[:, None] + torch.arange(count, device=first_B.device)
        rows_B1 = torch.arange(batch, device=first_B.device)[:, None]
        self._slab[rows_B1, :, positions_BT] = new_BGTE.transpose(1, 2)
        return self.rows

    def keep(self, rows: Tensor) -> None:
        """Drop every row that is not in `rows` [kept]."""
        if self._slab is not None:
            self._slab = self._slab[rows]


class TargetCache:
    """The target's cache with a length for each row.

    Attributes:
        lengths_B: committed tokens; the next forward's first token gets this position.
    """

    def __init__(self, target: Target, batch: int) -> None:
        self.lengths_B = torch.zeros(batch, dtype=torch.long, device=target.model.device)
        self._layers = [_SlabLayer(self) for _ in range(target.config.num_hidden_layers)]
        self.cache = Cache(layers=list(self._layers))
        kinds = getattr(target.config, "layer_types", None) or ()
        self._window = target.config.sliding_window if "sliding_attention" in kinds else None

    def positions(self, count: int) -> Tensor:
        """Positions [B, T] of the next `count` tokens."""
        return self.lengths_B[:, None] + torch.arange(count, device=self.lengths_B.device)

    def mask(self, count: int) -> Tensor | dict[str, Tensor]:
        """What the next `count` tokens see, [B, 1, T, S]; by kind of layer where some have a sliding window."""
        positions_BT1 = self.positions(count)[..., None]
        slots_S = torch.arange(int(self.lengths_B.max()) + count, device=self.lengths_B.device)
        seen_B1TS = (slots_S <= positions_BT1)[:, None]
        if self._window is None:
            return seen_B1TS
        near_B1TS = (slots_S > positions_BT1 - self._window)[:, None]
        return {"full_attention": seen_B1TS, "sliding_attention": seen_B1TS & near_B1TS}

    def keep(self, rows: Tensor) -> None:
        """Drop every row that is not in `rows` [kept]."""
        self.lengths_B = self.lengths_B[rows]
        for layer in self._layers:
            layer.keep(rows)


class _SlabLayer(DynamicLayer):
    """Writes where the owner's lengths say."""

    def __init__(self, owner: TargetCache) -> None:
        super().__init__()
        self._owner = owner
        self._key_slab, self._value_slab = Slab(), Slab()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        first_B = self._owner.lengths_B
        return self._key_slab.write(key_states, first_B), self._value_slab.write(value_states, first_B)

    def keep(self, rows: Tensor) -> None:
        self._key_slab.keep(rows)
        self._value_slab.keep(rows)
