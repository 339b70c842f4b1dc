"""The processes of one run: a single one, or several that torchrun or `accelerate launch` started (data-parallel)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from dspark_serving.errors import EnvironmentMismatchError, OptionError

_PATIENCE = timedelta(days=7)  # the others wait while the first process lets the target answer


class Processes:
    """A run in one process: nothing to wait for, nothing to average."""

    rank, world = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over the processes during backward()."""
        return module

    def without_averaging(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Inside, backward() only accumulates."""
        return nullcontext()

    def wait(self) -> None:
        """Until every process is here."""

    def agree(self, value: bool) -> bool:
        """The first process' value, in every process."""
        return value

    def mean(self, value: torch.Tensor) -> float:
        """Mean of a scalar over the processes."""
        return value.item()

    @contextmanager
    def one_after_first(self) -> Iterator[None]:
        """The first process runs the body, then the others do (and find what it left)."""
        yield


class LaunchedProcesses(Processes):
    """Several processes, through accelerate. Every one holds the drafter and the target; only data are split.

    Raises:
        EnvironmentMismatchError: accelerate is not installed.
        OptionError: accelerate is configured for a sharding that a checkpoint here does not know.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
        except ImportError:
            raise EnvironmentMismatchError(
                "training in several processes needs accelerate",
                expected="accelerate to be installed",
                fix="Run `pip install 'dspark-serving[train]'`.",
            ) from None
        # An objective may leave a head without gradient (a weight of 0).
        handlers = [
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=_PATIENCE),
        ]
        self._accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=handlers)
        kind = str(self._accelerator.distributed_type.value)
        if kind not in ("MULTI_CPU", "MULTI_GPU"):
            raise OptionError(
                f"accelerate is configured for {kind}",
                expected="plain data-parallel processes: a drafter is small",
                fix="Launch with torchrun, or `accelerate launch --multi_gpu` (or --cpu).",
            )
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes

    def wrap(self, module: nn.Module) -> nn.Module:
        return self._accelerator.prepare_model(module)

    def without_averaging(self, module: nn.Module) -> AbstractContextManager[Any]:
        return self._accelerator.no_sync(module)

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()

    def agree(self, value: bool) -> bool:
        from accelerate.utils import broadcast_object_list

        return bool(broadcast_object_list([value])[0])

    def mean(self, value: torch.Tensor) -> float:
        return float(self._accelerator.reduce(value.to(self._accelerator.device), "mean"))

    @contextmanager
    def one_after_first(self) -> Iterator[None]:
        with self._accelerator.main_process_first():
            yield


def launched(device: torch.device) -> Processes:
    """The processes of this run, from the launcher's environment."""
    return LaunchedProcesses(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Processes()
