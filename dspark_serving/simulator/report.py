"""From runs to rows and a table: every policy as a share of the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from dspark_serving.simulator.runner import Run
from dspark_serving.simulator.worlds import World

Row = dict[str, Any]
ORACLE, FIXED = "oracle", ("off", "full")


def rows_of(world: World, seed: int, runs: Mapping[str, Run]) -> list[Row]:
    """One row a policy; `runs` holds the oracle and both fixed policies too."""
    oracle = runs[ORACLE].tokens_per_second
    fixed = max(runs[name].tokens_per_second for name in FIXED)
    return [
        {
            "scenario": world.name,
            "kind": world.kind,
            "policy": name,
            "seed": seed,
            "share_of_oracle": round(run.tokens_per_second / oracle, 4),
            "ratio_to_best_fixed": round(run.tokens_per_second / fixed, 4),
            "tokens_per_second": round(run.tokens_per_second, 2),
            "accepted_length": round(run.accepted_length, 3),
            "verified_tokens_per_round": round(run.verified_tokens / run.request_rounds, 3),
            "drafting": round(run.drafting_rounds / run.rounds, 3),
            "rounds": run.rounds,
        }
        for name, run in runs.items()
    ]


def summaries(rows: Sequence[Row]) -> list[Row]:
    """Over the seeds: mean and least share of each policy in each scenario, with `seed` None."""
    summary = []
    for scenario, policy in dict.fromkeys((row["scenario"], row["policy"]) for row in rows):
        of = [row for row in rows if (row["scenario"], row["policy"]) == (scenario, policy)]
        summary.append(
            {
                "scenario": scenario,
                "kind": of[0]["kind"],
                "policy": policy,
                "seed": None,
                "seeds": len(of),
                **{key: round(fmean(row[key] for row in of), 4) for key in _MEANS},
                "lowest_share_of_oracle": min(row["share_of_oracle"] for row in of),
                "lowest_ratio_to_best_fixed": min(row["ratio_to_best_fixed"] for row in of),
            }
        )
    return summary


_MEANS = ("share_of_oracle", "ratio_to_best_fixed", "tokens_per_second", "accepted_length", "verified_tokens_per_round")


def markdown(summary: Sequence[Row], notes: str) -> str:
    """Scenarios by policies; behind them the candidate against the better of off and full."""
    policies = list(dict.fromkeys(row["policy"] for row in summary if row["policy"] != ORACLE))
    lines = [
        f"| scenario | kind | {' | '.join(policies)} | adaptive / max(off, full) |",
        "|---|---|" + "---|" * (len(policies) + 1),
    ]
    for scenario in dict.fromkeys(row["scenario"] for row in summary):
        at = {row["policy"]: row for row in summary if row["scenario"] == scenario}
        cells = [f"{at[policy]['share_of_oracle']:.3f}" for policy in policies]
        fixed = f"{at['adaptive']['ratio_to_best_fixed']:.3f}" if "adaptive" in at else ""
        lines.append(f"| {scenario} | {at[ORACLE]['kind']} | {' | '.join(cells)} | {fixed} |")
    return f"# Simulator: share of the oracle\n\n{notes}\n\n" + "\n".join(lines) + "\n"
