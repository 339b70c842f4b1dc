"""Importable stand-ins for compiled packages that SGLang imports on CPU and that have no CPU wheel.

SGLang loads the entry points of `sglang.srt.platforms` while it is imported, in every process and before its schedulers
import `sgl_kernel`; a general plugin would come too late. A real package always wins: the finder sits last.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence

import torch
from transformers.utils import is_torchvision_available, is_torchvision_v2_available

from dspark_serving.errors import EnvironmentMismatchError
from dspark_serving.sglang_adapter.cpu import kernels


def has_accelerator() -> bool:
    """Whether torch finds any accelerator; everything in this package is for machines where it finds none."""
    return torch.accelerator.is_available()


def activate() -> None:
    """Platform entry point: make the stand-ins importable where there is no accelerator.

    Returns None, which tells SGLang that this is no platform of its own: it goes on to choose its CPU platform.
    """
    if has_accelerator():
        return
    # Read at import time by SGLang's is_cpu(), in this process and in those it spawns.
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    # The threads of the spawned schedulers: spinning ones collapse when the machine is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if any(isinstance(finder, _StandInFinder) for finder in sys.meta_path):
        return
    # transformers remembers its first look for torchvision: let it look before the stand-in could be mistaken for it.
    is_torchvision_available()
    is_torchvision_v2_available()
    sys.meta_path.append(_StandInFinder())


def _fill_sgl_kernel(module: types.ModuleType) -> None:
    for name in kernels.IMPLEMENTED:
        setattr(module, name, getattr(kernels, name))
    for name in kernels.UNAVAILABLE:
        setattr(module, name, kernels.unavailable(name))


def _fill_sgl_kernel_speculative(module: types.ModuleType) -> None:
    vars(module)["reconstruct_indices_from_tree_mask"] = kernels.reconstruct_indices_from_tree_mask


class _Absent:
    """A name of a package that is not here: may be imported and referred to, not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> _Absent:
        return _Absent(f"{self._name}.{attribute}")

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise EnvironmentMismatchError(
            f"{self._name} was called, and torchvision is not installed here",
            expected="a text model, which needs no torchvision",
            fix="Install the torchvision that fits this torch to serve image models.",
        )


def _fill_torchvision(module: types.ModuleType) -> None:
    def absent(attribute: str) -> _Absent:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _Absent(f"{module.__name__}.{attribute}")

    vars(module)["__getattr__"] = absent


STAND_INS: dict[str, Callable[[types.ModuleType], None]] = {
    "sgl_kernel": _fill_sgl_kernel,
    "sgl_kernel.speculative": _fill_sgl_kernel_speculative,
    # SGLang imports these names at module level for image models; a text server calls none of them.
    "torchvision": _fill_torchvision,
    "torchvision.io": _fill_torchvision,
    "torchvision.transforms": _fill_torchvision,
    "torchvision.transforms.functional": _fill_torchvision,
    "torchvision.transforms.v2": _fill_torchvision,
    "torchvision.transforms.v2.functional": _fill_torchvision,
}


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of STAND_INS; asked only after every real finder has passed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in STAND_INS:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in STAND_INS)
        return importlib.util.spec_from_loader(fullname, self, origin="dspark-serving", is_package=is_package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        STAND_INS[module.__name__](module)
