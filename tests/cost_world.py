"""Engines with known step times: the oracle of the cost model's tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dspark_serving.scheduler.cost import CostModel, CostSample

GAMMA = 5


@dataclass
class World:
    """Seconds of a round on a small CPU, or on tiers of captured graphs."""

    tiers: tuple[int, ...] | None = None
    context_slope: float = 2e-6
    speed: float = 1.0  # factor on every time
    sampled_token: float = 0.0  # seconds more of a verified token of a sampled request; twice that in its draft pass
    noise: float = 0.05
    poison: float = 0.0  # share of rounds that something else makes 3-20x slower

    def draft(self, requests: int, sampled: int = 0) -> float:
        return self.speed * (0.009 + 0.0013 * requests + 2 * self.sampled_token * sampled)

    def verify(self, requests: int, tokens: int, context: int, sampled: int = 0) -> float:
        padded = next((tier for tier in self.tiers or () if tier >= tokens), tokens)
        tokens_cost = 0.066 + 0.0035 * padded if self.tiers is None else 0.02 + 0.006 * padded**0.7
        tokens_cost += self.sampled_token * tokens * sampled / requests
        return self.speed * (tokens_cost + 0.004 * (requests - 1) + self.context_slope * context)

    def plain(self, requests: int, context: int, sampled: int = 0) -> float:
        return self.verify(requests, requests, context, sampled) - self.speed * 0.005

    def round(
        self,
        rng: np.random.Generator,
        requests: int,
        tokens: int,
        context: int,
        drafted: bool = True,
        sampled: int = 0,
    ) -> CostSample:
        """A measured round."""
        rest = self.verify(requests, tokens, context, sampled) if drafted else self.plain(requests, context, sampled)
        rest *= float(np.exp(rng.normal(0, self.noise)))
        if rng.random() < self.poison:
            rest *= rng.uniform(3, 20)
        draft = self.draft(requests, sampled) * float(np.exp(rng.normal(0, self.noise))) if drafted else 0.0
        return CostSample(requests, tokens, context, draft, draft + rest, drafted, sampled)

    def profile(
        self, rng: np.random.Generator, requests: Sequence[int] = (1, 4, 8, 16), repetitions: int = 2
    ) -> list[CostSample]:
        """What a server measures of itself at its start."""
        samples = []
        for count in requests:
            for repetition in range(repetitions):
                context = count * (200, 600)[repetition % 2]
                totals = (count, 2 * count, 4 * count, 6 * count)
                samples += [self.round(rng, count, total, context) for total in totals]
                samples.append(self.round(rng, count, count, context, drafted=False))
        return samples

    def errors(self, model: CostModel, requests: Sequence[int] = (1, 2, 4, 8, 16)) -> np.ndarray:
        """Relative errors of `model.verify` at every total of several batches."""
        errors = []
        for count in requests:
            totals = np.arange(count, count * (GAMMA + 1) + 1)
            true = [self.verify(count, int(total), 400 * count) for total in totals]
            errors.append(model.verify(count, totals, 400 * count) / true - 1)
        return np.abs(np.concatenate(errors))

    def live(
        self, rng: np.random.Generator, rounds: int, requests: Sequence[int] = (1, 2, 4, 8, 16)
    ) -> Iterator[CostSample]:
        """Rounds of a running server."""
        for _ in range(rounds):
            count = int(rng.choice(requests))
            drafted = rng.random() < 0.8
            total = int(rng.integers(count, count * (GAMMA + 1) + 1)) if drafted else count
            yield self.round(rng, count, total, int(rng.integers(100, 800)) * count, drafted)


def serve(model: CostModel, rounds: Iterator[CostSample]) -> None:
    """Let the model observe the rounds."""
    for sample in rounds:
        model.observe(*sample)
