"""What drafters of all families have in common: the target's embedding as they were trained with it, and loading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from dspark_serving.drafters import canonical_names


class ScaledEmbedding(nn.Module):
    """An embedding whose rows are multiplied by `factor`: the drafter was trained on others than the target's."""

    def __init__(self, embedding: nn.Module, factor: float) -> None:
        super().__init__()
        self._embedding, self._factor = embedding, factor

    def forward(self, input_ids: Tensor) -> Tensor:
        rows: Tensor = self._embedding(input_ids)
        return rows * self._factor


def scaled_as_trained(embedding: nn.Module, config: Any) -> nn.Module:
    """The embedding with the scale of the drafter's config; a Gemma target's scales its rows itself."""
    factor = getattr(config, "embed_scale", 1.0) / getattr(embedding, "embed_scale", 1.0)
    return embedding if factor == 1.0 else ScaledEmbedding(embedding, factor)


def canonical_weights(weights: Iterable[tuple[str, Tensor]], config: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights to load of a checkpoint of the format that `config` names, by their canonical names.

    Where values are the projected keys, the projection comes a second time as the values'.
    """
    rename = canonical_names(config.dspark_format)
    for published, tensor in weights:
        name = rename(published)
        if name is None:
            continue
        yield name, tensor
        if ".k_proj." in name and getattr(config, "attention_k_eq_v", False):
            yield name.replace(".k_proj.", ".v_proj."), tensor
