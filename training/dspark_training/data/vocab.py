"""The draft vocabulary: the tokens a draft may contain, as columns of the target's vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from dspark_training.data.store import Sample


class DraftVocab:
    """A sorted subset of token ids, with the way back.

    Attributes:
        ids_V: token id of each draft column, ascending.
        columns_T: draft column of each target id, -1 outside.
    """

    def __init__(self, token_ids: Iterable[int], target_vocab_size: int, device: torch.device | None = None) -> None:
        """`device`: where the tables lie; the CPU if it is not given."""
        self.ids_V: Tensor = torch.tensor(sorted(set(token_ids)), device=device)
        self.columns_T: Tensor = torch.full((target_vocab_size,), -1, device=device)
        self.columns_T[self.ids_V] = torch.arange(len(self.ids_V), device=device)

    @classmethod
    def most_frequent(
        cls,
        samples: Iterable[Sample],
        size: int,
        target_vocab_size: int,
        always: Iterable[int],
        device: torch.device | None = None,
    ) -> tuple[DraftVocab, float]:
        """The `size` most frequent answer tokens and the share of answer tokens that they cover.

        Ties go to the smaller id, and unused places to the smallest ids (byte-level tokenizers put their
        commonest pieces first). `always` (stop tokens) is kept whatever its count.
        """
        counts = Counter(token for s in samples for token in s.supervised_ids())
        must = set(always)
        ranked = sorted(range(target_vocab_size), key=lambda i: (i not in must, -counts[i], i))
        vocab = cls(ranked[:size], target_vocab_size, device)
        covered = sum(counts[i] for i in vocab.ids_V.tolist())
        return vocab, covered / max(1, counts.total())
