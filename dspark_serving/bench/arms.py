"""What is compared: arms, each a running server or one to be launched, and perhaps a policy that it is set to."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dspark_serving.errors import OptionError
from dspark_serving.server import running_server


class Attached(NamedTuple):
    """A server that runs already and is left running."""

    url: str


class Launched(NamedTuple):
    """A server that is started for the measurement and ended after it."""

    model: Path
    options: tuple[str, ...]


Host = Attached | Launched


class PolicyChoice(NamedTuple):
    """What the plugin's route /dspark/policy is told before a run."""

    policy: str
    threshold: float | None = None


@dataclass(frozen=True)
class Arm:
    """One of the things compared; arms with equal hosts share a server."""

    name: str
    host: Host
    policy: PolicyChoice | None = None
    drafter: str | None = None
    family: str | None = None  # of what drafts; None where nothing speculates
    greedy_only: bool = False  # cannot sample, so is left out above temperature 0


@contextmanager
def opened(host: Host, log: Path) -> Iterator[str]:
    """The URL of a host; a launched one lives as long as the context.

    Raises:
        EnvironmentMismatchError: the server does not start.
    """
    if isinstance(host, Attached):
        yield host.url
        return
    with running_server(host.model, host.options, log=log) as server:
        yield server.url


def parse_arm(text: str, shared: Host | None, model: Path | None) -> Arm:
    """An arm from `NAME=policy:POLICY[:THRESHOLD]`, `NAME=url:URL` or `NAME=server:OPTIONS`.

    Args:
        text: as given on the command line.
        shared: the server whose policy is switched.
        model: target of the servers that are launched.

    Raises:
        OptionError: the text has another form, or lacks the server or model that it needs.
    """
    name, _, rest = text.partition("=")
    kind, _, value = rest.partition(":")
    if not (name and value):
        raise _bad_arm(text)
    match kind:
        case "policy" if shared is not None:
            policy, _, threshold = value.partition(":")
            return Arm(name, shared, PolicyChoice(policy, _threshold(text, threshold) if threshold else None))
        case "url":
            return Arm(name, Attached(value.rstrip("/")))
        case "server" if model is not None:
            return Arm(name, Launched(model, tuple(shlex.split(value))))
        case "policy":
            fix = "Name the server whose policy is switched with --url, or with --model and --server."
            raise OptionError(f"--arm {text} has no server", expected="one", fix=fix)
        case "server":
            raise OptionError(f"--arm {text} has no target", expected="--model", fix="Name the target with --model.")
        case _:
            raise _bad_arm(text)


def _threshold(text: str, threshold: str) -> float:
    try:
        return float(threshold)
    except ValueError as error:
        raise _bad_arm(text) from error


def _bad_arm(text: str) -> OptionError:
    return OptionError(
        f"--arm {text!r}",
        expected="NAME=policy:POLICY[:THRESHOLD], NAME=url:URL or NAME=server:OPTIONS",
        fix="For example --arm off=policy:off --arm ours=policy:adaptive.",
    )
