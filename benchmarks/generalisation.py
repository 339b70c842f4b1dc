"""Where a drafter loses length: answers it was trained on, held-out ones, and prompts of another origin (issue 5).

`python -m benchmarks.generalisation`. A gap between the first two says that a drafter learned its data by heart; one
between the last two says that its training prompts do not look like those of the evaluation. How much of an answer's
wording occurs in the training answers at all, and what prompt lookup makes of it, say how far off they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from dspark_training.config import OptimConfig
from dspark_training.data.answers import answer
from dspark_training.data.prompts import read_prompts
from dspark_training.data.store import Sample, split
from dspark_training.data.tokens import load_samples
from dspark_training.data.vocab import DraftVocab
from dspark_training.evaluation.figures import Totals, draws, interval
from dspark_training.evaluation.subjects import load_drafter
from dspark_training.evaluation.walk import Walk, walk_drafter, walk_prompt_lookup
from dspark_training.features.source import OnlineFeatures
from dspark_training.objectives.build import build_objective
from dspark_training.run import EVALUATION_TOKENS
from dspark_training.target import Target

from dspark_serving.assets import ensure_smollm2
from dspark_serving.bench.results import ResultFile, Row
from dspark_serving.cli.console import one_line_errors, report

_ROOT = Path(__file__).resolve().parents[1]
_RESULT = Path(__file__).parent / "results" / "generalisation.json"
_SAMPLES = _ROOT / "examples" / "data" / "smollm2-135m-answers"
_BUNDLES = _ROOT / "examples" / "bundles"
_WORK = Path("runs/generalisation")
_NGRAM = 4
_PROMPTS = Path(__file__).parent / "prompts"
DOMAINS = {"math": "gsm8k_test", "code": "humaneval", "chat": "chat"}
"""Of the training answers, and the evaluation prompts of the same kind."""


class Kind(NamedTuple):
    """What a set of answers belongs to."""

    domain: str
    origin: str


def ngrams(samples: Iterable[Sample]) -> set[tuple[int, ...]]:
    """What the assistant wrote, in runs of 4 tokens."""
    return {gram for sample in samples for gram in _grams(sample)}


def _grams(sample: Sample) -> list[tuple[int, ...]]:
    ids = sample.supervised_ids()
    return [tuple(ids[at : at + _NGRAM]) for at in range(len(ids) - _NGRAM + 1)]


def totals(walks_Q: Sequence[Walk]) -> Totals:
    """Tokens and rounds of each answer."""
    return Totals(
        np.array([len(walk.accepted) + sum(walk.accepted) for walk in walks_Q]),
        np.array([len(walk.accepted) for walk in walks_Q]),
    )


def greedy_sets(samples_path: Path, target: Target, count: int, share: float, work: Path) -> dict[Kind, list[Sample]]:
    """Greedy answers, `count` of each kind at most; those to evaluation prompts are made if they are not in `work`."""
    trained, held_out = split(load_samples(samples_path), share)
    found: dict[Kind, list[Sample]] = {}
    for domain, name in DOMAINS.items():
        for origin, samples in (("trained on", trained), ("held out", held_out)):
            greedy = (s for s in samples if s.temperature == 0 and s.domain == domain and s.supervised > 1)
            found[Kind(domain, origin)] = [sample for sample, _ in zip(greedy, range(count), strict=False)]
        report(f"answers to {name}")
        store = answer(
            target,
            read_prompts(_PROMPTS / f"{name}.jsonl")[:count],
            work / f"evaluation_{name}.jsonl",
            greedy_share=1.0,
            temperature=1.0,
            max_new_tokens=EVALUATION_TOKENS,
            max_prompt_tokens=1024,
            batch_size=32,
            seed=1,
            progress=lambda done, total: None,
        )
        found[Kind(domain, name)] = [sample for sample in store if sample.has_anchor][:count]
    return found


def rows_of(drafter: Path, target: Target, target_path: Path, sets: dict[Kind, list[Sample]]) -> list[Row]:
    """One row a set of answers."""
    loaded = load_drafter(drafter, target, target_path)
    family = loaded.spec.family
    vocab = DraftVocab(loaded.proposer.ids_U.tolist(), loaded.spec.vocab_size)
    objective = build_objective(family, loaded.proposer.model, target, vocab, OptimConfig(steps=1))
    source = OnlineFeatures(target, loaded.proposer.layer_ids)
    rows: list[Row] = []
    for kind, samples in sets.items():
        found = totals([walk for sample in samples for walk in walk_drafter(objective, source, [sample])])
        length = interval(float(found.ratio()), found.ratio(draws(len(samples))))
        lookup = totals([walk_prompt_lookup(sample, loaded.spec.gamma) for sample in samples])
        rows.append(
            {
                "family": family,
                "drafter": drafter.name,
                **kind._asdict(),
                "temperature": 0.0,
                "answers": len(samples),
                "accepted_length": length.value,
                "accepted_length_low": length.low,
                "accepted_length_high": length.high,
                "prompt_lookup": float(lookup.ratio()),
            }
        )
        report(f"{family}, {kind.domain}, {kind.origin}: {length.value:.2f}")
    return rows


def markdown(rows: list[Row], notes: str) -> str:
    """A line a set of answers."""
    lines = [
        "| drafter | domain | answers | of | accepted length (95 %) | prompt lookup | 4-grams seen in training |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        between = f"{row['accepted_length_low']:.2f} to {row['accepted_length_high']:.2f}"
        lines.append(
            f"| {row['family']} | {row['domain']} | {row['answers']} | {row['origin']} | {row['accepted_length']:.2f} "
            f"({between}) | {row['prompt_lookup']:.2f} | {row['seen_ngrams']:.0%} |"
        )
    return f"# Where accepted length is lost\n\n{notes}\n\n" + "\n".join(lines) + "\n"


def main(
    families: Annotated[str, typer.Option(help="A list.")] = "dspark,eagle3,dflash",
    answers: Annotated[int, typer.Option(help="Answers of each kind, at most.", min=2)] = 60,
    samples: Annotated[Path, typer.Option(help="What the drafters were trained on.")] = _SAMPLES,
    validation_share: Annotated[float, typer.Option(help="Of it, held out by their runs.")] = 0.03,
    work: Annotated[Path, typer.Option(help="Where answers to the evaluation prompts are kept.")] = _WORK,
    output: Annotated[Path, typer.Option(help="JSON file; a table is written beside it.")] = _RESULT,
) -> None:
    """Walk the shipped drafters over answers that they were trained on, held-out ones and the evaluation's."""
    with one_line_errors():
        path = ensure_smollm2("bf16", report=report)
        target = Target.load(path)
        sets = greedy_sets(samples, target, answers, validation_share, work)
        learned = ngrams(split(load_samples(samples), validation_share)[0])
        result = ResultFile("generalisation", output)
        rows: list[Row] = []
        for family in families.split(","):
            rows += rows_of(_BUNDLES / f"smollm2-135m-{family}", target, path, sets)
        for row in rows:
            grams = [g for s in sets[Kind(row["domain"], row["origin"])] for g in _grams(s)]
            row["seen_ngrams"] = sum(gram in learned for gram in grams) / max(len(grams), 1)
        notes = (
            "Greedy answers, walked round by round on exact features; intervals bootstrapped over answers. Held-out "
            "answers belong to prompts of the training data's origin, which no run has seen. The last column counts an "
            "answer's own 4-grams of tokens that occur in the training answers."
        )
        result.write(rows, notes)
        output.with_suffix(".md").write_text(markdown(rows, notes))
        report(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
