"""Whether a configuration fits its target: known from both alone, so said before the target answers anything."""

from __future__ import annotations

from pathlib import Path

from dspark_serving.errors import OptionError
from dspark_training.config import RunConfig
from dspark_training.features.cache import layer_columns
from dspark_training.models.setup import check_context_layers, dims_for
from dspark_training.models.warm_start import start_spec
from dspark_training.target import Target


def check_settings(config: RunConfig, target: Target, processes: int) -> None:
    """Refuse a configuration that no drafter of this target can be trained by.

    Raises:
        OptionError: a layer or token id that the target does not have, layers that the cache would lack, or
            micro-batches that the processes cannot share.
        CheckpointError: a target that shows no layers, or a drafter to start from that does not fit.
    """
    dims_for(target, config.drafter, config.algorithm)
    held, start = config.features.layer_ids, config.warm_start
    if held is not None:
        check_context_layers(target, "features.layer_ids", held)
        layer_columns(held, config.drafter.target_layer_ids, target.config.hidden_size)
    if start is not None:
        start_spec(target, config.drafter.target_layer_ids, Path(start.path), start.part)
    if config.optim.micro_batches % processes:
        raise OptionError(
            f"{config.optim.micro_batches} micro-batches a step in {processes} processes",
            expected="a multiple of the number of processes",
            fix=f"Set optim.micro_batches={processes} (and a lower optim.sequences for the same batch).",
        )
