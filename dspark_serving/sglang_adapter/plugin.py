"""Entry point of SGLang's plugin loader.

The loader logs an exception and goes on, and SGLang has algorithms of the same names: a plugin that fails to load
would be served by stock code without anybody noticing. So every failure here leaves them refusing to start.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from dspark_serving import __version__
from dspark_serving.errors import DsparkError, EnvironmentMismatchError

logger = logging.getLogger(__name__)

SGLANG_RANGE = ">=0.5.23,<0.5.24"
# SGLang's names of the algorithms that this package serves, by families of drafters.
ALGORITHMS = {"dspark": "DSPARK", "dflash": "DFLASH", "eagle3": "EAGLE3"}


def load() -> None:
    """Check SGLang and register the hooks, in every process of the server.

    Raises:
        EnvironmentMismatchError: SGLang is outside the range, or a hooked symbol has changed. The loader only logs it;
            choosing an algorithm of ours afterwards raises it again.
    """
    _report_errors_in_one_line()
    try:
        check_sglang_version(importlib.metadata.version("sglang"))
        from dspark_serving.sglang_adapter import hooks

        hooks.register()
    except BaseException as error:
        refuse_algorithms(error)
        raise
    logger.info("dspark-serving %s is loaded", __version__)


def check_sglang_version(found: str) -> None:
    """Raise EnvironmentMismatchError unless `found` is a version that this release was built for."""
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(SGLANG_RANGE).contains(found, prereleases=True):
        raise EnvironmentMismatchError(
            f"SGLang {found} is installed",
            expected=f"a version {SGLANG_RANGE} for dspark-serving {__version__}",
            fix="Install that SGLang, or the dspark-serving release made for yours.",
        )


def refuse_algorithms(error: BaseException) -> None:
    """Make the algorithms that we should have served refuse to start, with `error` as the reason; others stay."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    refusal = error if isinstance(error, DsparkError) else _as_dspark_error(error)

    def guard(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def guarded(self: SpeculativeAlgorithm, *args: Any, **kwargs: Any) -> Any:
            if self.name in ALGORITHMS.values():
                raise refusal
            return original(self, *args, **kwargs)

        return guarded

    # The first runs in the launching process while it resolves its arguments, the second in the scheduler.
    for name in ("handle_server_args", "create_worker"):
        setattr(SpeculativeAlgorithm, name, guard(getattr(SpeculativeAlgorithm, name)))


def _as_dspark_error(error: BaseException) -> EnvironmentMismatchError:
    return EnvironmentMismatchError(
        f"dspark-serving {__version__} could not be loaded ({type(error).__name__}: {error})",
        expected="a complete installation beside a supported SGLang",
        fix="Reinstall dspark-serving; the full traceback is in the log above.",
    )


def _report_errors_in_one_line() -> None:
    """Print an uncaught DsparkError as the one line it is, without a traceback; the exit status stays 1."""
    previous = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, DsparkError):
            sys.stderr.write(f"dspark: error: {error}\n")
        else:
            previous(kind, error, traceback)

    sys.excepthook = report
