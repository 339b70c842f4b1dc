"""Plays a world: the policy plans and admits, the world accepts and takes its time, the policy observes.

Expected instead of drawn tokens are counted (given the true survivals and the verify lengths), and true instead of
measured seconds: both have the same mean and less noise. What policies see is drawn and noisy.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dspark_serving.errors import DataError
from dspark_serving.scheduler.round import Batch, Outcome, Policy
from dspark_serving.simulator.worlds import Machine, Text, World


class Run(NamedTuple):
    """What a policy made of a world."""

    tokens: float  # expected, bonus tokens included
    seconds: float
    rounds: int
    request_rounds: int
    drafting_rounds: int
    verified_tokens: int  # anchors included

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together, without prefill."""
        return self.tokens / self.seconds

    @property
    def accepted_length(self) -> float:
        """Tokens a round and request, bonus token included."""
        return self.tokens / self.request_rounds


class Simulation:
    """One world and one seed; every policy that plays it meets the same requests with the same texts."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Back to the start."""
        world, slots = self.world, self.world.slots
        length = world.output[1] + world.gamma + 1
        self.progress = 0.0
        self._noise = np.random.default_rng((self._seed, 1 << 40))
        self._next_text = 0
        self._slots_R = np.zeros(0, dtype=np.int64)
        self._generation_S = np.zeros(slots, dtype=np.int64)
        self._context_S = np.zeros(slots, dtype=np.int64)
        self._done_S = np.zeros(slots, dtype=np.int64)  # tokens put out
        self._output_S = np.zeros(slots, dtype=np.int64)
        self._level_SL, self._logit_SL, self._luck_SL = (np.zeros((slots, length)) for _ in range(3))
        self._by_position_S, self._by_token_S = np.zeros(slots), np.zeros(slots)
        self._positions_G = np.arange(world.gamma)

    def play(self, policy: Policy) -> Run:
        """From start to end.

        Raises:
            DataError: the policy's verify lengths are impossible.
        """
        self.reset()
        tokens = seconds = 0.0
        rounds = request_rounds = drafting = verified = 0
        late: deque[Outcome] = deque()
        while seconds < self.world.seconds:
            self.progress = seconds / self.world.seconds
            arrived = self._fill()
            batch = self.batch()
            outcome, expected, taken = self._round(policy, batch, arrived)
            late.append(outcome)
            if len(late) > self.world.lag:
                policy.observe(late.popleft())
            self._advance(batch.slots_R, outcome.accepted_R)
            tokens += expected
            seconds += taken
            rounds += 1
            request_rounds += batch.requests
            drafting += outcome.plan.drafts
            verified += int(outcome.verify_lens_R.sum())
        return Run(tokens, seconds, rounds, request_rounds, drafting, verified)

    # ---- the truth, for the oracle too

    @property
    def machine(self) -> Machine:
        """As it is now."""
        busy = self.world.busy(self.progress)
        return self.world.machine if busy == 1.0 else replace(self.world.machine, busy=busy)

    @property
    def drafting(self) -> float:
        """How many times as long drafting rounds take now as the machine says."""
        return self.world.drafting(self.progress)

    def batch(self) -> Batch:
        """The running requests."""
        slots_R = self._slots_R
        return Batch.ordinary(slots_R, self._context_S[slots_R], self._generation_S[slots_R])

    def conditional(self, slots_R: np.ndarray) -> np.ndarray:
        """This round's true chances of each drafted token to survive, given that those before it did, [R, G]."""
        return _sigmoid(self._of_block(self._logit_SL, slots_R))

    def sample_conditionals(self, slots_R: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
        """The same as far as it is known before drafting: as drawn for other tokens of the passage, [M, R, G]."""
        level_RG = self._of_block(self._level_SL, slots_R)
        noise_MRG = rng.normal(size=(samples, *level_RG.shape))
        return _sigmoid(level_RG + self._by_token_S[slots_R][:, None] * noise_MRG)

    def _of_block(self, table_SL: np.ndarray, slots_R: np.ndarray) -> np.ndarray:
        columns_RG = self._done_S[slots_R][:, None] + self._positions_G
        by_position_RG = self._by_position_S[slots_R][:, None] * self._positions_G
        logit_RG: np.ndarray = table_SL[slots_R[:, None], columns_RG] + by_position_RG
        return logit_RG + self.world.easier(self.progress)

    # ---- a round

    def _round(self, policy: Policy, batch: Batch, arrived: bool) -> tuple[Outcome, float, float]:
        """The outcome as policies see it, expected tokens and true seconds."""
        world, requests = self.world, batch.requests
        context = int(batch.context_R.sum())
        slower = world.slower(self.progress)
        plan = policy.plan(batch)
        if plan.drafts:
            conditional_RG = self.conditional(batch.slots_R)
            confidence_RG = self._confidence(conditional_RG)
            lens_R = policy.admit(batch, plan, confidence_RG)
            _check(lens_R, requests, world.gamma)
            verified_RG = self._positions_G < (lens_R - 1)[:, None]
            survival_RG = np.cumprod(conditional_RG, axis=1)
            expected = requests + float(survival_RG[verified_RG].sum())
            columns_RG = self._done_S[batch.slots_R][:, None] + self._positions_G
            lucky_RG = self._luck_SL[batch.slots_R[:, None], columns_RG] < conditional_RG
            accepted_R = np.cumprod(lucky_RG & verified_RG, axis=1).sum(axis=1).astype(np.int32)
            total = int(lens_R.sum())
            slower *= self.drafting
            draft = slower * self.machine.draft(requests)
            rest = slower * float(self.machine.verify(requests, np.array([total]), context)[0])
        else:
            confidence_RG, lens_R = None, np.ones(requests, dtype=np.int32)
            accepted_R, expected = np.zeros(requests, dtype=np.int32), float(requests)
            draft, rest = 0.0, slower * self.machine.plain(requests, context)
        seen_draft, seen = draft * self._jitter(), rest * self._jitter()
        if self._noise.random() < world.outliers:
            seen *= 3.0
        outcome = Outcome(
            batch, plan, confidence_RG, lens_R, accepted_R, seen_draft, seen_draft + seen, steady=not arrived
        )
        return outcome, expected, draft + rest

    def _confidence(self, conditional_RG: np.ndarray) -> np.ndarray:
        scale, shift = self.world.confidence_scale(self.progress), self.world.confidence_shift(self.progress)
        if scale == 1.0 and shift == 0.0:
            return conditional_RG.astype(np.float32)
        logit_RG = np.log(conditional_RG / (1.0 - conditional_RG))
        return _sigmoid(scale * logit_RG + shift).astype(np.float32)

    def _jitter(self) -> float:
        return float(np.exp(self.world.noise * self._noise.normal()))

    def _fill(self) -> bool:
        """Let finished requests go, and as many come as the world wants; whether any came."""
        wanted = int(self.world.requests(self.progress))
        self._slots_R = self._slots_R[self._done_S[self._slots_R] < self._output_S[self._slots_R]][:wanted]
        if len(self._slots_R) == wanted:
            return False
        free = np.setdiff1d(np.arange(self.world.slots), self._slots_R)[: wanted - len(self._slots_R)]
        for slot in free:
            text = Text(self.world, self._seed, self._next_text)
            self._next_text += 1
            self._generation_S[slot] += 1
            self._context_S[slot], self._done_S[slot], self._output_S[slot] = text.prompt, 0, text.output
            self._level_SL[slot], self._logit_SL[slot], self._luck_SL[slot] = text.level_L, text.logit_L, text.luck_L
            self._by_position_S[slot], self._by_token_S[slot] = text.domain.by_position, text.domain.by_token
        self._slots_R = np.concatenate([self._slots_R, free])
        return len(free) > 0

    def _advance(self, slots_R: np.ndarray, accepted_R: np.ndarray) -> None:
        self._done_S[slots_R] = np.minimum(self._done_S[slots_R] + accepted_R + 1, self._output_S[slots_R])
        self._context_S[slots_R] += accepted_R + 1


def _check(lens_R: np.ndarray, requests: int, gamma: int) -> None:
    if lens_R.shape != (requests,) or not ((lens_R >= 1) & (lens_R <= gamma + 1)).all():
        raise DataError(
            f"the policy answered the verify lengths {lens_R}",
            expected=f"{requests} numbers from 1 to {gamma + 1}",
            fix="Correct its admit().",
        )


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    value: np.ndarray = 1.0 / (1.0 + np.exp(-logit))
    return value
