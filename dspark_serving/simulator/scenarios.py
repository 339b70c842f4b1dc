"""The suite: stationary loads, and worlds in which something moves.

Two machines. `gpu`: a 4B target on a large accelerator, captured tiers, overlap. `cpu`: a 135M target on two cores,
eager, where every token costs. The figures are plausible, not measured: policies must cope with either shape.
"""

from __future__ import annotations

from dataclasses import replace

from dspark_serving.simulator.worlds import Domain, Machine, World, ramp, square, still, there_and_back, visits

CAPTURED = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)
"""Batch sizes; SGLang captures tiers of (gamma + 1) times these token totals."""

GPU = Machine(
    floor_seconds=6e-3,
    token_seconds=24e-6,
    request_seconds=4e-6,
    context_seconds=45e-9,
    draft_floor_seconds=1.2e-3,
    draft_request_seconds=6e-6,
    smooth=60.0,
    wave=64,
    tiers=tuple(8 * size for size in CAPTURED),
)
CPU = Machine(
    floor_seconds=45e-3,
    token_seconds=3.2e-3,
    request_seconds=1.5e-3,
    context_seconds=2e-6,
    draft_floor_seconds=5e-3,
    draft_request_seconds=1.2e-3,
    smooth=8.0,
)

MATH = Domain("math", 1.6)
CODE = Domain("code", 2.2, by_position=-0.1)
CHAT = Domain("chat", 0.2)
WEAK = Domain("weak", -1.8)
"""What the drafter was not trained on."""


def _gpu(name: str, requests: int, *domains: Domain) -> World:
    return World(name, "stationary", GPU, domains, still(requests), lag=1)


def _cpu(name: str, requests: int, *domains: Domain) -> World:
    return World(name, "stationary", CPU, domains, still(requests))


def _moving(world: World, **changes: object) -> World:
    return replace(world, kind="moving", **changes)  # type: ignore[arg-type]


SCENARIOS: tuple[World, ...] = (
    _gpu("gpu-1", 1, MATH),
    _gpu("gpu-16", 16, MATH),
    _gpu("gpu-64", 64, CHAT),
    _gpu("gpu-128-mixed", 128, MATH, CODE, CHAT, WEAK),
    _gpu("gpu-192-weak", 192, WEAK),
    _cpu("cpu-1", 1, MATH),
    _cpu("cpu-4", 4, CHAT),
    _cpu("cpu-16", 16, MATH),
    _cpu("cpu-8-mixed", 8, MATH, CHAT, WEAK),
    _cpu("cpu-4-weak", 4, WEAK),
    _cpu("cpu-32-chat", 32, CHAT),
    _moving(_gpu("gpu-context", 48, CHAT), prompt=(512, 1024), output=(6000, 12000), rounds=8000),
    _moving(_cpu("cpu-context", 8, CHAT), prompt=(64, 128), output=(2000, 4000), rounds=4000),
    _moving(_gpu("gpu-bursts", 2, MATH, CHAT), requests=square(2, 128, 6)),
    _moving(_cpu("cpu-bursts", 1, MATH, CHAT), requests=square(1, 24, 6)),
    # A load test passing by: every load for about 30 rounds, with easy, middling and hopeless texts in turn.
    _moving(
        _cpu("cpu-visits", 1, CHAT),
        requests=visits(*(1, 2, 4, 8, 16, 32) * 6),
        easier=visits(*(level for level in (1.8, 0.6, -0.3, -1.0, -1.5, -2.2) for _ in range(6))),
        output=(32, 32),
        rounds=1600,
    ),
    _moving(_gpu("gpu-acceptance-drift", 96, CHAT), easier=there_and_back(1.5, -2.0)),
    _moving(_cpu("cpu-acceptance-drift", 8, CHAT), easier=there_and_back(1.5, -2.0)),
    _moving(_gpu("gpu-busy-machine", 64, MATH), busy=square(1.0, 2.5, 3)),
    _moving(_cpu("cpu-busy-machine", 8, MATH), busy=there_and_back(1.0, 3.0)),
    _moving(_cpu("cpu-slow-machine", 8, CHAT), slower=square(1.0, 2.0, 2)),
    # What the start-up profile did not tell: for half of the time, drafting rounds are dearer and plain ones are not.
    _moving(_cpu("cpu-dear-drafting", 4, CHAT), drafting=square(1.0, 1.6, 2)),
    _moving(_gpu("gpu-dear-drafting", 64, CHAT), drafting=square(1.0, 1.6, 2)),
    _moving(_gpu("gpu-overconfident", 96, CHAT), confidence_scale=still(1.5), confidence_shift=still(0.8)),
    _moving(_cpu("cpu-overconfident", 8, CHAT), confidence_scale=still(1.5), confidence_shift=still(0.8)),
    _moving(_gpu("gpu-calibration-drift", 128, CHAT), confidence_scale=ramp(1.0, 2.0), confidence_shift=ramp(0.0, 1.5)),
    _moving(_cpu("cpu-calibration-drift", 16, CHAT), confidence_scale=ramp(1.0, 2.0), confidence_shift=ramp(0.0, 1.5)),
)
