"""The one exception type that users see: what is wrong, what was expected, what to do."""

from __future__ import annotations


class DsparkError(Exception):
    """An error whose message a user can act on.

    Args:
        problem: what was found, with the offending name or value.
        expected: what would have been right.
        fix: what to do about it.
    """

    def __init__(self, problem: str, *, expected: str, fix: str) -> None:
        super().__init__(f"{problem}; expected {expected}. {fix}")
        self.problem = problem
        self.expected = expected
        self.fix = fix


class CheckpointError(DsparkError):
    """A checkpoint is missing, damaged, or contradicts itself or its target."""


class OptionError(DsparkError):
    """An option or a combination of options cannot be used."""


class EnvironmentMismatchError(DsparkError):
    """The machine, SGLang's version or a hooked symbol is not what this release was built for."""


class DataError(DsparkError):
    """A dataset row, prompt file or training store cannot be used."""
