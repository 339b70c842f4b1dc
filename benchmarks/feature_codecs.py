"""What compressed features cost a drafter: `python -m benchmarks.feature_codecs` (issue 5).

The same run once for each way to get features: same start, same groups, same anchors, so that only the rounding of the
features differs. Every drafter is then judged on exact features of held-out answers, as a server would give them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from dspark_training.evaluation.figures import Interval, Totals, draws, interval

from dspark_serving.assets import ensure_smollm2
from dspark_serving.bench.results import ResultFile, Row
from dspark_serving.cli.console import one_line_errors, report

_RESULT = Path(__file__).parent / "results" / "feature_codecs.json"
_ROOT = Path(__file__).resolve().parents[1]
ARMS = ("online", "int8", "fp8", "int4", "int3")


def train_arm(arm: str, target_path: Path, overrides: list[str]) -> tuple[Row, Totals]:
    """Train with one kind of features; its row, and tokens and rounds of each held-out greedy answer."""
    from dspark_training.data.tokens import load_samples
    from dspark_training.evaluation.walk import walk_drafter
    from dspark_training.features.cache import CachedFeatures
    from dspark_training.features.source import OnlineFeatures
    from dspark_training.recipe import load_recipe
    from dspark_training.target import Target
    from dspark_training.trainer import Trainer

    target = Target.load(target_path)
    features = ["features.source=online"] if arm == "online" else [f"features.codec={arm}"]
    with tempfile.TemporaryDirectory(prefix="dspark-codecs-") as scratch:
        directory = [f"features.directory={Path(scratch) / 'features'}"]  # of this arm alone
        config = load_recipe(target, ["smollm2_135m"], "dspark", [*directory, *features, *overrides])
        samples = list(load_samples(_ROOT / str(config.data.samples)))
        trainer = Trainer(config, target, samples, Path(scratch))
        trainer.run(lambda step: None)
        on_disk = trainer.source.counts.bytes_per_token if isinstance(trainer.source, CachedFeatures) else 0.0
    exact = OnlineFeatures(target, trainer.layer_ids, trainer.scale_M)
    greedy = [s for s in trainer.validation_samples if s.temperature == 0 and s.supervised > 1]
    walks_Q = [walk_drafter(trainer.objective, exact, [sample]) for sample in greedy]
    totals = Totals(
        np.array([sum(1 + accepted for walk in walks for accepted in walk.accepted) for walks in walks_Q]),
        np.array([sum(len(walk.accepted) for walk in walks) for walks in walks_Q]),
    )
    width = (len(trainer.layer_ids) + 1) * target.config.hidden_size  # the captured layers and the head's input
    row: Row = {
        "features": arm,
        "family": "dspark",
        "steps": trainer.step,
        "seconds": trainer.seconds,
        "disk_bytes_per_token": on_disk,
        "bf16_bytes_per_token": 2 * width,
        "accepted_length": float(totals.ratio()),
        "answers": len(greedy),
        "validation_loss": trainer.history[-1]["validation_loss"],
    }
    return row, totals


def loss_of_length(totals: Totals, exact: Totals) -> Interval:
    """Relative loss of accepted length against exact features, over the same answers."""
    drawn = draws(len(totals.tokens_Q))
    return interval(float(1 - totals.ratio() / exact.ratio()), 1 - totals.ratio(drawn) / exact.ratio(drawn))


def markdown(rows: list[Row], notes: str) -> str:
    """A line a codec."""
    lines = ["| features | bytes a token on disk | of bf16 | accepted length | lost (95 %) |", "|---|---|---|---|---|"]
    for row in rows:
        share = row["disk_bytes_per_token"] / row["bf16_bytes_per_token"]
        lost = "-" if row["lost"] is None else f"{row['lost']:.1%} ({row['lost_low']:.1%} to {row['lost_high']:.1%})"
        cells = (row["features"], f"{row['disk_bytes_per_token']:.0f}", f"{share:.0%}", f"{row['accepted_length']:.3f}")
        lines.append(f"| {' | '.join((*cells, lost))} |")
    return f"# Compressed features\n\n{notes}\n\n" + "\n".join(lines) + "\n"


def main(
    arms: Annotated[str, typer.Option(help="A list; the first one is what the others are compared with.")] = ",".join(
        ARMS
    ),
    set_: Annotated[list[str] | None, typer.Option("--set", help="A recipe field, for every run.")] = None,
    target: Annotated[Path | None, typer.Option(help="Target; by default SmolLM2 in bf16.")] = None,
    output: Annotated[Path, typer.Option(help="JSON file; a table is written beside it.")] = _RESULT,
) -> None:
    """Train a DSpark drafter once with each kind of features and compare accepted lengths."""
    with one_line_errors():
        path = target or ensure_smollm2("bf16", report=report)
        result = ResultFile("feature_codecs", output)
        rows: list[Row] = []
        exact = None
        for arm in arms.split(","):
            row, totals = train_arm(arm, path, set_ or [])
            exact = totals if exact is None else exact
            lost = loss_of_length(totals, exact) if rows else (None, None, None)
            rows.append(row | dict(zip(("lost", "lost_low", "lost_high"), lost, strict=True)))
            report(
                f"{arm}: accepted length {row['accepted_length']:.3f}, {row['disk_bytes_per_token']:.0f} bytes a token"
            )
            notes = (
                f"DSpark, {row['steps']} steps from the same start over the same groups and anchors, one run after the "
                f"other; {row['answers']} held-out greedy answers, walked on exact features. Lost: against "
                f"{rows[0]['features']}, bootstrapped over answers; the runs differ by chance too."
            )
            result.write(rows, notes)
            output.with_suffix(".md").write_text(markdown(rows, notes))
        report(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
