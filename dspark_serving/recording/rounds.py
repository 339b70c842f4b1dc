"""What a recording holds: rounds, in which order the policy was asked, and what it knew at some moments."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dspark_serving.recording.state import State
from dspark_serving.scheduler.round import Outcome

NEVER = -1


class Round(NamedTuple):
    """A round and the moments (numbers of a common count) at which the policy was asked about it.

    Under overlap a round is planned before the one before it is finished; a replay has to ask in the same order.
    """

    outcome: Outcome
    admitted_R: np.ndarray | None  # int32: verify lengths as the policy gave them; None when it was not asked
    planned: int  # NEVER: planned before the recording began, or by another policy
    admitted: int  # NEVER: not asked
    observed: int  # NEVER: the round was given up; its outcome is made up


class Snapshot(NamedTuple):
    """What was known at a moment."""

    moment: int
    state: State  # of the policy and of the cost model
