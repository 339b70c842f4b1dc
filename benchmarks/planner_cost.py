"""Host time of a round's planning, ours and SGLang's own: `python -m benchmarks.planner_cost`.

Ours: `plan` and `admit` of the adaptive policy, in the state in which it compares all totals (nothing is bypassed).
Native: SGLang's `compute_verify_token_budget` over the old survivals and its top-k step over the current confidences,
both as on a host without accelerator. The two take turns in one process, on the same confidences and cost curve.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors this small only wait for a second thread

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from sglang.kernels.ops.speculative.dspark.dspark_schedule import ScheduleVerifyLensTopk
from sglang.srt.speculative.dspark_components import dspark_planner as native

from dspark_serving.bench.results import ResultFile, Row
from dspark_serving.cli.console import one_line_errors, report
from dspark_serving.scheduler.adaptive import AdaptivePolicy
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.cost import CostModel, CostSample
from dspark_serving.scheduler.recalibration import OnlineCalibration
from dspark_serving.scheduler.round import Batch, Outcome

_RESULT = Path(__file__).parent / "results" / "planner_cost.json"
_REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_CONTEXT = 500
_TURN = 20
"""Rounds that a planner runs before it is the other one's turn."""


def seconds_of(tokens: int) -> float:
    """A verify pass whose tokens are neither free nor so dear that nothing is verified, for 1 to 512 requests."""
    return 0.06 + 0.0002 * tokens


def cost_model(most: int) -> CostModel:
    """Our model of that pass, a draft pass of 8 ms on top."""
    tokens = [2**i for i in range(most.bit_length() + 1)]
    drafting = [CostSample(1, n, _CONTEXT, 0.008, 0.008 + seconds_of(n), True) for n in tokens for _ in range(2)]
    plain = [CostSample(n, n, _CONTEXT * n, 0.0, seconds_of(n), False) for n in tokens]
    return CostModel.fit(drafting + plain)


def confidences(rng: np.random.Generator, requests: int, gamma: int) -> np.ndarray:
    """Blocks from hard to easy."""
    base_R1 = rng.uniform(0.5, 0.95, (requests, 1))
    return np.clip(base_R1 + rng.uniform(-0.2, 0.2, (requests, gamma)), 0.01, 0.99).astype(np.float32)


def ours(requests: int, gamma: int, rng: np.random.Generator) -> Callable[[np.ndarray], object]:
    """A planner as servers have it, with a calibration and a warm history; returns one round of it."""
    calibration = OnlineCalibration(Calibration.identity(gamma))
    policy = AdaptivePolicy(gamma, requests, cost_model(requests * (gamma + 1)), calibration)
    batch = Batch.ordinary(np.arange(requests), np.full(requests, _CONTEXT, dtype=np.int64))
    for _ in range(33):  # beyond the warm-up, for a full history
        shown_RG = confidences(rng, requests, gamma)
        plan = policy.plan(batch)
        lens_R = policy.admit(batch, plan, shown_RG)
        survived_R = np.cumprod(rng.random(shown_RG.shape) < shown_RG, axis=1).sum(axis=1)
        accepted_R = np.minimum(survived_R, lens_R - 1).astype(np.int32)
        policy.observe(Outcome(batch, plan, shown_RG, lens_R, accepted_R, 0.008, 0.1, False))
    return lambda confidence_RG: policy.admit(batch, policy.plan(batch), confidence_RG)


def sglang_own(requests: int, gamma: int, rng: np.random.Generator) -> Callable[[np.ndarray], object]:
    """SGLang's planner with a table that knows every total."""
    config = native.DSparkScheduleConfig(gamma=gamma)
    totals = list(range(1, requests * (gamma + 1) + 1))
    table = native.SpsCostTable(
        max_batch_tokens=totals[-1],
        sample_batch_tokens=totals,
        sample_steps_per_sec=[1 / (0.008 + seconds_of(n)) for n in totals],
    )
    history_RG = torch.from_numpy(confidences(rng, requests, gamma)).cumprod(dim=1)

    def one_round(confidence_RG: np.ndarray) -> object:
        decision = native.compute_verify_token_budget(history_survival_probs=history_RG, sps_table=table, cfg=config)
        return ScheduleVerifyLensTopk.torch(
            confidence=torch.from_numpy(confidence_RG), budget=decision.budget, cfg=config
        )

    return one_round


def measure(requests: int, gamma: int, repetitions: int, seed: int) -> list[Row]:
    """Median microseconds of both, in short turns."""
    rng = np.random.default_rng(seed)
    planners = {"ours": ours(requests, gamma, rng), "native": sglang_own(requests, gamma, rng)}
    times: dict[str, list[float]] = {name: [] for name in planners}
    for block in range(-1, -(-repetitions // _TURN)):  # the first one warms up
        blocks = [confidences(rng, requests, gamma) for _ in range(_TURN)]
        for name, one_round in planners.items():
            for confidence_RG in blocks:
                start = time.perf_counter()
                one_round(confidence_RG)
                if block >= 0:
                    times[name].append(time.perf_counter() - start)
    return [
        {
            "planner": name,
            "requests": requests,
            "positions": gamma,
            "repetitions": len(seconds),
            "microseconds": round(float(np.median(seconds)) * 1e6, 1),
            "microseconds_p95": round(float(np.quantile(seconds, 0.95)) * 1e6, 1),
        }
        for name, seconds in times.items()
    ]


def markdown(rows: list[Row], notes: str) -> str:
    """One line a batch size."""
    lines = ["| requests | ours, median us (p95) | native, median us (p95) |", "|---|---|---|"]
    for requests in dict.fromkeys(row["requests"] for row in rows):
        at = {row["planner"]: row for row in rows if row["requests"] == requests}
        cells = (f"{at[name]['microseconds']:.1f} ({at[name]['microseconds_p95']:.1f})" for name in ("ours", "native"))
        lines.append(f"| {requests} | " + " | ".join(cells) + " |")
    return f"# Planner cost\n\n{notes}\n\n" + "\n".join(lines) + "\n"


def main(
    gamma: Annotated[int, typer.Option(min=1, help="Drafted tokens a block.")] = 7,
    repetitions: Annotated[int, typer.Option(min=10, help="Timed rounds for each batch size.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the confidences.")] = 0,
    output: Annotated[Path, typer.Option(help="JSON file; a table is written beside it.")] = _RESULT,
) -> None:
    """Time the planning of a round for 1 to 512 requests."""
    with one_line_errors():
        torch.set_num_threads(1)
        result = ResultFile("planner_cost", output)
        rows: list[Row] = []
        for requests in _REQUESTS:
            rows += measure(requests, gamma, repetitions, seed)
            report(", ".join(f"{row['planner']} {row['microseconds']:.1f} us" for row in rows[-2:]) + f" at {requests}")
        notes = (
            f"Plan and admission of one round on the host, {gamma} positions, one thread; the two planners take turns "
            f"of {_TURN} rounds. Ours calibrates the confidences, native takes them as they are. Native: SGLang's "
            "compute_verify_token_budget and top-k step, every total in its table."
        )
        result.write(rows, notes)
        output.with_suffix(".md").write_text(markdown(rows, notes))
        report(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
