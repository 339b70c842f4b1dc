"""What a policy has learned, as plain values: taken from a running one, put into a newly made one.

Walks the attributes of the policy and of the scheduler's objects that it holds, so that a field added to one of them
cannot be forgotten. Dictionaries and sets are caches by the scheduler's convention: they are emptied, not kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

from dspark_serving.errors import DataError

_FIX = "Replay it with the version of dspark-serving that recorded it."


class State(NamedTuple):
    """By path of attributes, as in `policy._gate._interval`."""

    arrays: dict[str, np.ndarray]  # numpy scalars as arrays without dimensions
    plain: dict[str, Any]  # numbers, strings, None, lists of those; enumerations by name


def capture(**roots: object) -> State:
    """A copy of everything that the objects hold and may change."""
    arrays: dict[str, np.ndarray] = {}
    plain: dict[str, Any] = {}
    for path, owner, name in _attributes(roots):
        value = getattr(owner, name)
        if isinstance(value, np.ndarray | np.generic):
            arrays[path] = np.array(value)
        elif isinstance(value, Enum):
            plain[path] = value.name
        elif _is_plain(value):
            plain[path] = list(value) if isinstance(value, tuple | list) else value
    return State(arrays, plain)


def reinstate(state: State, **roots: object) -> None:
    """Make objects, built from the same parts as those that were captured, go on from `state`.

    Raises:
        DataError: they are built differently.
    """
    known = {**state.arrays, **state.plain}
    for path, owner, name in list(_attributes(roots)):
        current = getattr(owner, name)
        if isinstance(current, dict | set):
            current.clear()
        elif path in known:
            _put(owner, name, current, known.pop(path), path)
    if known:
        raise DataError(f"the recording knows {next(iter(known))}", expected="what this version learns", fix=_FIX)


def _put(owner: object, name: str, current: Any, value: Any, path: str) -> None:
    if isinstance(current, np.ndarray) and isinstance(value, np.ndarray):
        if current.shape == value.shape and current.dtype == value.dtype:
            current[...] = value  # in place: other objects may hold views of it
            return
        raise DataError(
            f"the recording's {path} has shape {value.shape} and type {value.dtype}",
            expected=f"{current.shape} and {current.dtype}",
            fix=_FIX,
        )
    if isinstance(value, np.ndarray):
        value = value[()]
    elif isinstance(current, Enum):
        value = next((member for member in type(current) if member.name == value), current)
    elif isinstance(value, list) and not isinstance(current, list):
        value = tuple(value)
    setattr(owner, name, value)


def _attributes(roots: dict[str, object]) -> Iterator[tuple[str, object, str]]:
    """(path, owner, name) of every attribute of every object that can be reached, each object once."""
    seen: set[int] = set()
    waiting = deque(roots.items())  # breadth first: an object that is a root and held by another has the root's path
    while waiting:
        path, owner = waiting.popleft()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        for name, value in vars(owner).items():
            held = value if isinstance(value, tuple) else (value,)
            learners = [(f"{path}.{name}.{index}", item) for index, item in enumerate(held) if _learns(item)]
            waiting.extend(learners)
            if not learners:
                yield f"{path}.{name}", owner, name


def _learns(value: object) -> bool:
    kind = type(value)
    frozen = is_dataclass(value) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    ours = kind.__module__.startswith("dspark_serving.")
    return ours and hasattr(value, "__dict__") and not frozen and not isinstance(value, Enum | tuple)


def _is_plain(value: object) -> bool:
    items = value if isinstance(value, tuple | list) else (value,)
    return all(item is None or isinstance(item, bool | int | float | str) for item in items)
