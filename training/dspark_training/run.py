"""The whole walk: prompts -> answers by the target -> drafter -> evaluation -> bundle."""

from __future__ import annotations

import logging
import platform
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dspark_serving.errors import DataError, OptionError
from dspark_training.bundle.finish import finish_bundle
from dspark_training.config import RunConfig
from dspark_training.data.answers import Progress, answer
from dspark_training.data.conversation import Prompt
from dspark_training.data.prompts import read_prompts, with_suffix
from dspark_training.data.skipped import Skipped
from dspark_training.data.store import Sample
from dspark_training.data.written import read_seeds, write_prompts
from dspark_training.evaluation.walk import walk_drafter, walk_prompt_lookup
from dspark_training.target import Target
from dspark_training.trainer import StepReport, Trainer

log = logging.getLogger(__name__)

EVALUATION_TOKENS = 256
DEMO_RECIPE = Path(__file__).parent / "recipes" / "smollm2_135m_dspark.json"
StageProgress = Callable[[str, int, int], None]  # (stage, done, total)


def run_recipe(
    recipe: Path,
    target_path: Path,
    bundle: Path,
    work: Path,
    evaluation_files: list[Path],
    on_step: Callable[[StepReport], None],
    on_answers: StageProgress,
) -> list[dict[str, Any]]:
    """Run a recipe from its prompts to the bundle; every stage resumes what an earlier run left in `work`.

    Returns:
        One row per evaluation file (see evaluate_drafter).

    Raises:
        DsparkError: the recipe, a prompt file or the target cannot be used, or training diverged.
    """
    config = load_recipe(recipe)
    if config.threads:
        torch.set_num_threads(config.threads)
    evaluation = {path.stem: read_prompts(path) for path in evaluation_files}
    target = Target.load(target_path)
    work.mkdir(parents=True, exist_ok=True)
    prompts = collect_prompts(config, target, Path.cwd(), work, partial(on_answers, "prompts by the target"))
    samples = collect_samples(config, target, prompts, work, partial(on_answers, "answers by the target"))
    return train_to_bundle(
        config, target, samples, evaluation, work, bundle, on_step, partial(on_answers, "answers for evaluation")
    )


def load_recipe(path: Path) -> RunConfig:
    """Read a recipe; every field is validated before anything runs.

    Raises:
        OptionError: the file is missing, or a field is unknown or out of bounds; names the first such field.
    """
    try:
        return RunConfig.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise OptionError(f"{path} does not exist", expected="a recipe in JSON", fix="Check the path.") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise OptionError(
            f"{path}: {field} is wrong ({first['msg']})", expected="a valid recipe", fix="Correct that field."
        ) from None


def collect_prompts(config: RunConfig, target: Target, root: Path, output: Path, progress: Progress) -> list[Prompt]:
    """Given prompts with their suffix, then those that the target writes (kept in `output` for a resumed run)."""
    data = config.data
    skipped = Skipped(output / "prompts.skipped.jsonl")
    prompts = [p for name in data.prompts for p in read_prompts(_found(root, name), skipped)]
    if skipped.counts:
        log.warning("%s", skipped.summary())
    prompts = with_suffix(prompts, data.suffix_domain, data.suffix, data.suffix_share, seed=config.seed)
    if not data.written_prompts:
        return prompts
    if data.openings is None:
        raise DataError(
            "written_prompts without openings",
            expected="data.openings, a JSON file of seeds (see `dspark data prompts`)",
            fix="Add it, or drop data.written_prompts.",
        )
    return prompts + write_prompts(
        target,
        read_seeds(root / data.openings),
        data.written_prompts,
        output / "written_prompts.jsonl",
        seed=config.seed,
        batch_size=data.batch_size,
        progress=progress,
    )


def _found(root: Path, name: str) -> str:
    """A path below `root` if it is there, else the name of a dataset."""
    return str(root / name) if name.endswith(".jsonl") or (root / name).exists() else name


def collect_samples(
    config: RunConfig, target: Target, prompts: list[Prompt], output: Path, progress: Progress
) -> list[Sample]:
    """Answers of the target to every prompt; resumes what an earlier run began."""
    data = config.data
    store = answer(
        target,
        prompts,
        output / "samples.jsonl",
        greedy_share=data.greedy_share,
        temperature=data.temperature,
        max_new_tokens=data.max_new_tokens,
        max_prompt_tokens=data.max_prompt_tokens,
        batch_size=data.batch_size,
        seed=config.seed,
        max_samples=data.max_samples,
        progress=progress,
    )
    return list(store)


def train_to_bundle(
    config: RunConfig,
    target: Target,
    samples: list[Sample],
    evaluation_prompts: dict[str, list[Prompt]],
    output: Path,
    bundle: Path,
    on_step: Callable[[StepReport], None],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Train, evaluate and export; returns the evaluation's rows (see evaluate_drafter)."""
    trainer = Trainer(config, target, samples, output)
    trainer.run(on_step)
    rows = evaluate_drafter(trainer, evaluation_prompts, output, progress)
    facts = _facts(trainer, samples, rows)
    finish_bundle(
        bundle,
        config,
        trainer.drafter,
        target,
        trainer.vocab,
        trainer.scale_M,
        trainer.source,
        trainer.validation_samples,
        facts,
        {"recipe": config.model_dump(mode="json"), "facts": facts, "history": trainer.history},
    )
    return rows


def evaluate_drafter(
    trainer: Trainer, prompts: dict[str, list[Prompt]], output: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Accepted length (bonus included, temperature 0) per dataset, beside prompt lookup on the same answers."""
    rows = []
    target, block_size = trainer.target, trainer.config.drafter.block_size
    for dataset, asked in prompts.items():
        store = answer(
            target,
            asked,
            output / f"evaluation_{dataset}.jsonl",
            greedy_share=1.0,
            temperature=1.0,
            max_new_tokens=EVALUATION_TOKENS,
            max_prompt_tokens=1024,
            batch_size=trainer.config.data.batch_size,
            seed=trainer.config.seed,
            progress=progress,
        )
        samples = [s for s in store if s.supervised > 1]
        walks = walk_drafter(target, trainer.objective, trainer.source, samples)
        accepted = [n for w in walks for n in w.accepted]
        looked_up = [n for s in samples for n in walk_prompt_lookup(s, block_size).accepted]
        rows.append(
            {
                "dataset": dataset,
                "temperature": 0.0,
                "requests": len(samples),
                "accepted_length": 1 + sum(accepted) / len(accepted),
                "prompt_lookup": 1 + sum(looked_up) / len(looked_up),
                "conditional_acceptance": _conditional(accepted, block_size),
            }
        )
        log.info("%s", rows[-1])
    return rows


def _conditional(accepted: list[int], block_size: int) -> list[float]:
    """Share of rounds that pass position k among those that passed k - 1."""
    passed = [sum(n >= k for n in accepted) for k in range(block_size + 1)]
    return [passed[k] / max(1, passed[k - 1]) for k in range(1, block_size + 1)]


def _facts(trainer: Trainer, samples: list[Sample], rows: list[dict[str, Any]]) -> dict[str, Any]:
    domains = Counter(s.domain for s in samples)
    return {
        "target": Path(trainer.target.config._name_or_path).parent.name or "the target",
        "dtype": str(trainer.target.model.dtype).removeprefix("torch."),
        "samples": len(samples),
        "answer_tokens": sum(s.supervised for s in samples),
        "domains": ", ".join(f"{n} {d}" for d, n in domains.most_common()),
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "hours": trainer.seconds / 3600,
        "machine": f"{torch.get_num_threads()} CPU threads ({platform.machine()})",
        "vocab_size": len(trainer.vocab.ids_V),
        "coverage": trainer.coverage,
        "eval_tokens": EVALUATION_TOKENS,
        "evaluation": rows,
    }
