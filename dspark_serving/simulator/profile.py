"""What a server would measure of a world's machine at its start: noisy, and wrong in one place."""

from __future__ import annotations

import numpy as np

from dspark_serving.scheduler.cost import CostSample
from dspark_serving.simulator.worlds import World

_REPEATS = 2
_SHORT, _LONG = 24, 256  # committed tokens a request, as sglang_adapter/profile.py has them
_DISTURBED = 1.3


def measure(world: World, seed: int) -> list[CostSample]:
    """Plain rounds, full and half verification for halved batch sizes; while one size was measured, a tenant ran."""
    rng = np.random.default_rng((seed, 2))
    machine, block = world.machine, world.gamma + 1
    sizes = [world.slots >> shift for shift in range(world.slots.bit_length())]
    disturbed = sizes[int(rng.integers(len(sizes)))]
    groups = [(min(4, world.slots), _LONG), *((size, _SHORT) for size in sizes)]
    samples = []
    for requests, prompt in groups:
        factor = _DISTURBED if (requests, prompt) == (disturbed, _SHORT) else 1.0
        context = requests * prompt
        for verify_len in (1, block, (block + 1) // 2 + 1):
            for _ in range(_REPEATS):
                drafted, tokens = verify_len > 1, requests * verify_len
                jitter, draft_jitter = factor * np.exp(world.noise * rng.normal(size=2))
                draft = float(machine.draft(requests) * draft_jitter) if drafted else 0.0
                rest = float(machine.verify(requests, np.array([tokens]), context)[0] * jitter)
                samples.append(CostSample(requests, tokens, context, draft, draft + rest, drafted))
    return samples
