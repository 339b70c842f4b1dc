"""An accelerator that there is not: its tensors say that they are on `meta` and hold their values on the CPU.

Whatever a real accelerator refuses (tensors of both places in one operation, a CPU's generator, numpy) is refused here,
so code that runs on it moves what has to be moved. Kernels, memory and speed of a real one are not tested by this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

PRETENDED = torch.device("meta")
_CPU = torch.device("cpu")
_aten = torch.ops.aten
_CROSSING = {_aten._to_copy.default, _aten.copy_.default, _aten._local_scalar_dense.default}
# A tensor there may be indexed by one on the CPU, not the other way round.
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class OtherDeviceError(RuntimeError):
    """An operation that a real accelerator would refuse."""


class _There(torch.Tensor):
    """A tensor on the pretended device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> _There:
        made: _There = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=PRETENDED,
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """`torch.tensor` fills a tensor out of a dispatch mode's sight."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device) == PRETENDED:
            return func(*args, **kwargs | {"device": _CPU}).to(PRETENDED)
        return func(*args, **kwargs)


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Inside, there is one; autocast does nothing on it."""
    autocast = torch.autocast

    def with_pretended(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == PRETENDED.type else autocast(device_type, *args, **kwargs)

    is_enabled = torch.is_autocast_enabled

    def asked(device_type: str = "cuda") -> bool:
        return device_type != PRETENDED.type and is_enabled(device_type)

    known = ["cpu", PRETENDED.type]
    fused = "torch.utils._foreach_utils._get_fused_kernels_supported_devices"
    with (
        mock.patch.object(torch, "autocast", with_pretended),
        mock.patch.object(torch, "is_autocast_enabled", asked),
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", return_value=known),
        mock.patch(fused, return_value=known),
        _Pretending(),
        _FromData(),
    ):
        yield PRETENDED


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    device = kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if func in _CROSSING:
        return _cross(func, args, kwargs, device)
    if any(isinstance(tensor, _There) for tensor in tensors):
        _refuse(func, args, kwargs, tensors)
    elif device is None or torch.device(device) != PRETENDED:
        return func(*args, **kwargs)
    found = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if func._schema.is_mutable:  # what was written to is returned as it came
        return kwargs.get("out", args[0]) if isinstance(found, torch.Tensor) else found
    return tree_map(_there, found)


def _cross(func: Any, args: Any, kwargs: dict[str, Any], device: Any) -> Any:
    found = func(*tree_map(_here, args), **tree_map(_here, {k: v for k, v in kwargs.items() if k != "non_blocking"}))
    if func is _aten.copy_.default:
        return args[0]
    if func is _aten._local_scalar_dense.default:
        return found
    goes = args[0].device if device is None else torch.device(device)
    return _There(found) if goes == PRETENDED else found


def _refuse(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> None:
    if any(t.device == PRETENDED and not isinstance(t, _There) for t in tensors):  # of a list used as an index, say
        raise OtherDeviceError(f"{func}: a tensor that was made out of sight; its values are lost")
    generator = kwargs.get("generator")
    strangers = [t for t in tensors if not isinstance(t, _There) and t.dim() > 0]
    allowed = func in _INDEXING and isinstance(args[0], _There)
    if generator is not None or (strangers and not allowed):
        raise OtherDeviceError(f"{func}: tensors or a generator of the CPU beside tensors of an accelerator")


def _here(value: Any) -> Any:
    if isinstance(value, _There):
        return value.held
    return _CPU if isinstance(value, torch.device) else value


def _there(value: Any) -> Any:
    return _There(value) if isinstance(value, torch.Tensor) and not isinstance(value, _There) else value
