"""What training costs beside a plain reference trainer: `python -m benchmarks.training_cost`.

Each trainer runs alone in a child process on the same samples, groups and anchors, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from dspark_serving.assets import ensure_smollm2
from dspark_serving.bench.results import ResultFile
from dspark_serving.cli.console import one_line_errors, report

_RESULT = Path(__file__).parent / "results" / "training_cost.json"
_SAMPLES = Path(__file__).resolve().parents[1] / "examples" / "data" / "smollm2-135m-answers"
ARMS = ("online", "cached int8", "cached int4", "cached int3", "reference")


def run_arm(arm: str, target: Path, store: Path, count: int, overrides: list[str]) -> dict[str, Any]:
    """One trainer over the first `count` samples, in this process."""
    from dspark_training.data.tokens import load_samples
    from dspark_training.features.cache import CachedFeatures
    from dspark_training.recipe import load_recipe
    from dspark_training.target import Target
    from dspark_training.trainer import Trainer

    from benchmarks import reference_trainer

    loaded = Target.load(target)
    samples = list(load_samples(store))[:count]
    kind, _, codec = arm.partition(" ")
    features = [f"features.source={kind}", f"features.codec={codec}"] if kind == "cached" else []
    config = load_recipe(loaded, [], "dspark", [*features, "validate_every_steps=1000000", *overrides])
    with tempfile.TemporaryDirectory() as scratch:
        if arm == "reference":
            row: dict[str, Any] = reference_trainer.train(config, loaded, samples, Path(scratch))
        else:
            trainer = Trainer(config, loaded, samples, Path(scratch))
            trainer.run()
            disk = trainer.source.counts.bytes_per_token if isinstance(trainer.source, CachedFeatures) else 0.0
            row = {"seconds": trainer.seconds, "steps": trainer.step, "tokens": trainer.tokens}
            row |= {"disk_bytes_per_token": disk, "preparation_seconds": 0.0}
            row["accepted_length"] = trainer.history[-1]["accepted_length"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    spent = row["seconds"] + row["preparation_seconds"]
    return {"trainer": arm, "family": "dspark", "tokens_per_second": row["tokens"] / spent, "peak_bytes": peak, **row}


def markdown(rows: list[dict[str, Any]], notes: str) -> str:
    lines = [
        "| trainer | target tokens/s, preparation included | peak memory (GB) | disk (bytes a token) |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['trainer']} | {r['tokens_per_second']:.0f} | {r['peak_bytes'] / 1e9:.2f} | "
        f"{r['disk_bytes_per_token']:.0f} |"
        for r in rows
    ]
    return f"# What training costs\n\n{notes}\n\n" + "\n".join(lines) + "\n"


def main(
    samples: Annotated[Path, typer.Option(help="A token store or a samples.jsonl.")] = _SAMPLES,
    target: Annotated[Path | None, typer.Option(help="Target; by default SmolLM2 in fp32.")] = None,
    count: Annotated[int, typer.Option(help="Samples to train on.")] = 64,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A recipe field, for every trainer.")] = None,
    arm: Annotated[str | None, typer.Option(help="Run one trainer and print its row.", hidden=True)] = None,
    output: Annotated[Path, typer.Option(help="JSON file; a table is written beside it.")] = _RESULT,
) -> None:
    """Measure tokens a second, peak memory and disk of every trainer."""
    with one_line_errors():
        path = target or ensure_smollm2("fp32", report=report)
        if arm is not None:
            sys.stdout.write(json.dumps(run_arm(arm, path, samples, count, set_ or [])) + "\n")
            return
        rows = []
        for name in ARMS:
            command = [sys.executable, "-m", "benchmarks.training_cost", "--samples", str(samples), "--arm", name]
            command += ["--target", str(path), "--count", str(count)]
            command += [word for override in set_ or [] for word in ("--set", override)]
            started = time.monotonic()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(cast(dict[str, Any], json.loads(done.stdout.splitlines()[-1])))
            report(f"{name}: {rows[-1]['tokens_per_second']:.0f} tokens/s ({time.monotonic() - started:.0f} s in all)")
        notes = (
            f"{count} samples, {rows[0]['steps']} optimizer steps on the same groups and anchors, one process after "
            "the other. The reference caches bfloat16 features of every token first (preparation) and holds "
            "whole-vocabulary tensors; its time includes both."
        )
        ResultFile("training_cost", output).write(rows, notes)
        output.with_suffix(".md").write_text(markdown(rows, notes))
        report(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
