"""Whether to draft at all: hysteresis, and rare looks at the other way of decoding."""

from __future__ import annotations

import math
from enum import Enum
from typing import Literal

import numpy as np

Verdict = Literal["draft", "off", "warm-up", "probe", "plain-probe"]


_FIRST_PLAIN = 4
"""Drafting rounds at a new load before the first plain one, and after a plain one that took an unexpected time."""
_PATIENCE = 16
"""Rounds for which a look waits for one without new requests."""
_LOOK_SHARE = 0.02
"""Of the time, at most, that looks take from plain decoding."""
_SPREAD = 0.6
"""Relative uncertainty of the advantage after a single round of a single request, with some reserve."""


_SLOWER, _FASTER = 0.4, 0.8
"""Logarithms of measured over predicted seconds that a single round may tell."""

_OCTAVES = 9
REGIMES = 2 * _OCTAVES
"""Loads that are told apart: 1, 2, 4, ..., 256 requests, most of them greedy or most of them sampled."""
_MODE_M, _OCTAVE_M = np.divmod(np.arange(REGIMES), _OCTAVES)
_NEARNESS_MM = 0.5 ** (np.abs(_OCTAVE_M[:, None] - _OCTAVE_M) + (_MODE_M[:, None] != _MODE_M))
"""What a round at one load says of another: half an octave further, half between greedy and sampled."""


def regime(requests: int, sampled: int) -> int:
    """Number of the load, below `REGIMES`."""
    return min(round(math.log2(requests)), _OCTAVES - 1) + (_OCTAVES if 2 * sampled > requests else 0)


class _State(Enum):
    WARMING = 1  # too little seen to judge
    DRAFTING = 2
    RESTING = 3
    LOOKING = 4  # drafting for a few rounds to see whether it pays again


class DraftGate:
    """Drafts while that is faster than plain decoding.

    The advantage it is told is (tokens a second with drafts) / (without), as predicted from earlier rounds. Drafting
    stops below 1 and starts again above 1 + margin. While it rests it looks every `interval` rounds, twice as rarely
    after each look that was in vain, and no sooner than the look has cost 2 % of the time; when the load jumps or
    requests have come, the prediction alone may start it.
    While it drafts at a small advantage, a single plain round, soon after a load is new and rarer each time, keeps the
    other prediction honest.
    """

    def __init__(self, *, margin: float = 0.02, interval: int = 64, longest: int = 512, evidence: int = 64) -> None:
        """`evidence` is the number of requests' rounds (of at most 16 rounds) that a judgement needs."""
        self._margin = margin
        self._shortest, self._longest = interval, longest
        self._evidence = evidence
        self._state = _State.WARMING
        self._drafted = 0  # observed drafting rounds in this state
        self._rested = 0  # rounds since the last look
        self._waited = 0  # rounds by which the next one was put off
        self._interval = interval
        self._newcomers_interval = interval // 4
        self._lost = 0.0  # plain rounds that the look under way has cost
        self._earned = 0, 0  # rounds by which the last look's cost is small; its requests
        self._jump_margin = margin
        self._load = (0, 0, 0)  # requests, context and newcomers at the last judgement against drafting
        self._load_now = self._load
        self._look_due = self._jumped = False  # as of this round
        self._by_prediction = False  # drafting was started without a look
        self._until_plain_M = [_FIRST_PLAIN] * REGIMES  # drafting rounds until the next plain one, by load
        self._plain_interval_M = [_FIRST_PLAIN] * REGIMES

    @property
    def resting(self) -> bool:
        """Plain decoding until further notice."""
        return self._state is _State.RESTING

    @property
    def looking(self) -> bool:
        """Only what was seen since the look began should be judged."""
        return self._state is _State.LOOKING

    def rests(self, requests: int, context: int, newcomers: int) -> bool:
        """Whether this round is plain without weighing anything; False: `decide` must be asked.

        Args:
            newcomers: requests that nothing was drafted for yet; when they are half of the batch, what earlier ones
                were like says little, and the next look comes early.
        """
        if self._state is _State.LOOKING:
            self._rested += 1
            return self._drafted == 0 and self._rested < self._shortest  # the outcome is still on its way
        if self._state is not _State.RESTING:
            return False
        self._rested += 1
        interval = self._newcomers_interval if 2 * newcomers >= requests else self._interval
        least, then = self._earned
        self._look_due = self._rested >= (max(interval, least) if 2 * requests >= then else interval)
        if self._look_due and newcomers > self._load_now[2] and self._waited < _PATIENCE:
            self._waited += 1  # new requests: behind their prefill, a look would not tell how long a round takes
            self._look_due = False
        self._load_now = (requests, context, newcomers)
        self._jumped = _differs(requests, self._load[0]) or _differs(context, self._load[1])
        self._jumped |= abs(newcomers - self._load[2]) >= max(requests / 4, 1)
        return not (self._look_due or self._jumped)

    def decide(self, advantage: float, requests: int, context: int, sampled: int = 0) -> Verdict:
        """What to do in this round; `sampled` requests are not greedy."""
        match self._state:
            case _State.WARMING:
                if not self._judges(requests):
                    return "warm-up"
                self._enter(_State.DRAFTING)
                self._drafted = 16  # the evidence is there already
                return self._while_drafting(advantage, requests, context, sampled)
            case _State.DRAFTING:
                return self._while_drafting(advantage, requests, context, sampled)
            case _State.RESTING:
                return self._while_resting(advantage)
            case _State.LOOKING:
                return self._while_looking(advantage, requests, context)

    def observe(self, drafted: bool, lost: float = 0.0) -> None:
        """A round's outcome is known; `lost`: its time less that of as many tokens in plain rounds, in those."""
        self._drafted += drafted
        self._lost += lost

    def surprised(self, load: int) -> None:
        """A plain round at this load took another time than predicted: one was not enough to learn from."""
        self._until_plain_M[load] = self._plain_interval_M[load] = _FIRST_PLAIN

    def _while_drafting(self, advantage: float, requests: int, context: int, sampled: int) -> Verdict:
        if advantage * (1.0 + self._doubt(requests)) < 1.0:
            if self._by_prediction and self._drafted < 32:
                self._jump_margin = min(2 * self._jump_margin, 0.5)  # a wrong start: the next one must be clearer
            self._rest(requests, context)
            return "off"
        if self._drafted >= self._shortest:
            self._jump_margin = self._margin
        load = regime(requests, sampled)
        self._until_plain_M[load] -= 1
        if self._until_plain_M[load] <= 0:
            self._plain_interval_M[load] = min(2 * self._plain_interval_M[load], 4 * self._longest)
            self._until_plain_M[load] = self._plain_interval_M[load]
            if advantage < 2.0:
                return "plain-probe"
        return "draft"

    def _while_resting(self, advantage: float) -> Verdict:
        if self._jumped and advantage > 1.0 + self._jump_margin:
            self._enter(_State.DRAFTING)
            self._by_prediction = True
            return "draft"
        self._load = self._load_now
        if not self._look_due:
            return "off"
        self._enter(_State.LOOKING)
        return "probe"

    def _while_looking(self, advantage: float, requests: int, context: int) -> Verdict:
        # Half of the doubt: a look that goes on costs what drafting in vain costs, and another one will come.
        if advantage * (1.0 + 0.5 * self._doubt(requests)) <= 1.0 + self._margin:
            self._interval = min(2 * self._interval, self._longest)
            self._newcomers_interval = min(2 * self._newcomers_interval, self._shortest)
            self._earned = min(math.ceil(max(self._lost, 0.0) / _LOOK_SHARE), self._longest), requests
            self._rest(requests, context)
            return "off"
        if not self._judges(requests):
            return "probe"
        self._enter(_State.DRAFTING)
        self._drafted = 16
        self._interval, self._jump_margin = self._shortest, self._margin
        self._newcomers_interval = self._shortest // 4
        return "draft"

    def _judges(self, requests: int) -> bool:
        return self._drafted >= min(16, math.ceil(self._evidence / requests))

    def _doubt(self, requests: int) -> float:
        """By how much the advantage may be underrated: a clear case is judged early, a close one by all evidence."""
        return 0.0 if self._judges(requests) else _SPREAD / math.sqrt(max(self._drafted * requests, 1))

    def _rest(self, requests: int, context: int) -> None:
        self._enter(_State.RESTING)
        self._load = (requests, context, 0)

    def _enter(self, state: _State) -> None:
        self._state = state
        self._drafted = self._rested = self._waited = 0
        self._lost = 0.0
        self._by_prediction = False


def _differs(now: int, then: int) -> bool:
    """By more than a quarter."""
    return abs(now - then) > 0.25 * then


class SlowRatio:
    """Realised over expected, as sums that forget; 1 until something is seen."""

    def __init__(self, *, strength: float, memory: float) -> None:
        """`strength` and `memory` in units of what is expected."""
        self._strength, self._memory = strength, memory
        self._realised = self._expected = 0.0

    @property
    def value(self) -> float:
        """At most 4, and never so small that nothing is worth a draft for ever."""
        return min(max((self._strength + self._realised) / (self._strength + self._expected), 0.01), 4.0)

    def observe(self, realised: float, expected: float) -> None:
        """Add a round."""
        keep = math.exp(-expected / self._memory)
        self._realised = keep * self._realised + realised
        self._expected = keep * self._expected + expected


class TimeBias:
    """Measured over predicted seconds of one way of decoding, by load (see `regime`).

    The mean logarithm, of clipped samples, so that no hiccup moves it far: accidents slow a round down, none makes it
    faster, so fast ones are clipped less. A load that was not met yet has the bias of those that were, by how near they
    are and how much was seen there.
    """

    def __init__(self, *, prior: float, slowest: float = 1 / 32) -> None:
        """The first sample at a load counts 1 / (1 + prior), no later one less than `slowest`."""
        self._prior, self._slowest = prior, slowest
        self._log_M = np.zeros(REGIMES)
        self._seen_M = np.zeros(REGIMES)
        self._met_M = np.zeros(REGIMES, dtype=bool)
        self._around: dict[int, float] = {}  # what the loads around one say that was not met, until the next round

    def value(self, load: int) -> float:
        """The factor that predictions should have had."""
        return math.exp(self._log(load))

    def observe(self, load: int, measured: float, predicted: float) -> float:
        """Add a round, both > 0; returns the logarithm by which it was unexpected."""
        error = math.log(measured / predicted) - self._log(load)
        weight = max(1.0 / (float(self._seen_M[load]) + 1.0 + self._prior), self._slowest)
        self._log_M[load] = self._log(load) + weight * min(max(error, -_FASTER), _SLOWER)
        self._met_M[load] = True
        self._around.clear()
        self._seen_M[load] += 1.0
        return error

    def doubt(self, load: int) -> None:
        """A round was decoded the other way: the older what was seen here, the more the next sample counts."""
        self._seen_M[load] *= 1.0 - self._slowest
        self._around.clear()

    def _log(self, load: int) -> float:
        if self._met_M[load]:
            return float(self._log_M[load])
        around = self._around.get(load)
        if around is None:
            weight_M = self._seen_M * _NEARNESS_MM[load]
            around = self._around[load] = float(weight_M @ self._log_M) / (1.0 + float(weight_M.sum()))
        return around
