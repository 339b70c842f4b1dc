"""The contract with SGLang: every symbol that we hook or extend still looks as it did when this release was built."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry

from dspark_serving.errors import EnvironmentMismatchError
from dspark_serving.sglang_adapter import hooks
from dspark_serving.sglang_adapter.bases import BASES, Base


@pytest.mark.parametrize("seam", [*hooks.HOOKS, *BASES], ids=lambda seam: seam.symbol)
def test_signature_is_unchanged(seam: hooks.Seam | Base) -> None:
    hooks.check_signature(seam.symbol, seam.signature)


def test_a_changed_signature_is_named() -> None:
    hook = hooks.HOOKS[0]
    with pytest.raises(EnvironmentMismatchError, match=hook.symbol.replace(".", r"\.")):
        hooks.check_signature(hook.symbol, hook.signature + ", something_new")


def test_a_vanished_symbol_is_named() -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"ServerArgs\.gone"):
        hooks.check_signature("sglang.srt.server_args.ServerArgs.gone", "self")


def test_every_symbol_is_hooked_once_and_says_why() -> None:
    symbols = [hook.symbol for hook in hooks.HOOKS]
    assert len(symbols) == len(set(symbols))
    assert all(seam.why for seam in (*hooks.HOOKS, *BASES))


def test_handlers_take_what_their_hook_passes() -> None:
    for hook in hooks.HOOKS:
        extra = 0 if hook.kind.value in ("before", "replace") else 1
        names = hook.signature.split(", ")
        assert any(_takes(hook.handler, extra + first, names[first:]) for first in range(len(names) + 1)), hook.symbol


def _takes(handler: Callable[..., Any], positional: int, names: list[str]) -> bool:
    """Whether it can be called with so many positional arguments and the rest by name."""
    try:
        inspect.signature(handler).bind(*range(positional), **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def test_an_unapplied_hook_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[str] = []
    monkeypatch.setattr(HookRegistry, "register", lambda symbol, handler, kind: registered.append(symbol))
    missing = hooks.Seam(
        "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.is_none", hooks.HOOKS[0].kind, print, "self", "a test"
    )
    monkeypatch.setattr(hooks, "HOOKS", (missing,))
    hooks.register()
    assert registered == [missing.symbol]
    with pytest.raises(EnvironmentMismatchError, match=r"is_none was not applied"):
        hooks.check_applied()
