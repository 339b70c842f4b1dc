"""The whole walk: prompts -> answers by the target -> drafter -> evaluation -> bundle."""

from __future__ import annotations

import logging
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dspark_serving.errors import DataError, OptionError
from dspark_training.bundle.finish import finish_bundle
from dspark_training.bundle.lineage import earlier_runs
from dspark_training.config import RunConfig
from dspark_training.data.answers import Progress, answer
from dspark_training.data.conversation import Prompt
from dspark_training.data.prompts import read_prompts, with_suffix
from dspark_training.data.skipped import Skipped
from dspark_training.data.store import Sample
from dspark_training.data.tokenizer import fingerprint
from dspark_training.data.tokens import load_samples
from dspark_training.data.written import read_seeds, write_prompts
from dspark_training.evaluation.figures import conditional_acceptance
from dspark_training.evaluation.walk import walk_drafter, walk_prompt_lookup
from dspark_training.models.check import check_settings
from dspark_training.processes import launched
from dspark_training.recipe import data_sha256, provenance
from dspark_training.target import Target
from dspark_training.trainer import StepReport, Trainer
from dspark_training.workdir import SAMPLES, WRITTEN, claim, complete_samples, is_complete, mark_complete, write_run

log = logging.getLogger(__name__)

EVALUATION_TOKENS = 256
StageProgress = Callable[[str, int, int], None]  # (stage, done, total)


def run_recipe(
    config: RunConfig,
    target: Target,
    bundle: Path,
    work: Path,
    evaluation_files: list[Path],
    on_step: Callable[[StepReport], None],
    on_answers: StageProgress,
) -> list[dict[str, Any]]:
    """Run a recipe from its prompts to the bundle; every stage resumes what an earlier run left in `work`.

    In several processes (see processes.py) the first one makes the data, the evaluation and the bundle.

    Returns:
        One row per evaluation file (see evaluate_drafter); none in other processes than the first.

    Raises:
        OptionError: `work` was made with another recipe, target or data, or two evaluation files have one name.
        DsparkError: a setting, a prompt file or the target cannot be used, or training diverged.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    processes = launched(target.model.device)
    evaluation = _evaluation_prompts(evaluation_files)
    check_settings(config, target, processes.world)
    origin = provenance(config, target, _data_files(config, work))
    with processes.one_after_first():
        if processes.first:
            claim(work, origin)
        samples = _samples(config, target, work, on_answers)
    trainer = Trainer(config, target, samples, work, processes)
    if processes.first:
        origin["data_sha256"] = data_sha256(_data_files(config, work))  # answers may be new
        write_run(work, origin)
    trainer.run(on_step)
    if not processes.first:
        return []
    return evaluate_and_bundle(
        trainer, samples, evaluation, origin, bundle, partial(on_answers, "answers for evaluation")
    )


def _evaluation_prompts(files: Sequence[Path]) -> dict[str, list[Prompt]]:
    """Prompts of each file, by its name without ".jsonl"."""
    names = [path.stem for path in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise OptionError(
            f"two evaluation files are called {twice}",
            expected="files of different names: results are reported by them",
            fix="Rename one, or leave it out.",
        )
    return {path.stem: read_prompts(path) for path in files}


def _samples(config: RunConfig, target: Target, work: Path, on_answers: StageProgress) -> Sequence[Sample]:
    if config.data.samples is not None:
        return load_samples(config.data.samples, fingerprint(target.tokenizer))
    if is_complete(work):
        return complete_samples(work)
    prompts = collect_prompts(config, target, Path.cwd(), work, partial(on_answers, "prompts by the target"))
    return collect_samples(config, target, prompts, work, partial(on_answers, "answers by the target"))


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
        output / WRITTEN,
        seed=config.seed,
        batch_size=data.batch_size,
        progress=progress,
    )


def _data_files(config: RunConfig, work: Path) -> list[Path]:
    """The files behind the samples, those in directories one by one; a dataset on the hub has none here."""
    if config.data.samples is not None:
        return _files(Path(config.data.samples))
    # A split may stand behind a path, as in DIRECTORY@SPLIT.
    given = [path if path.exists() else Path(str(path).partition("@")[0]) for path in map(Path, config.data.prompts)]
    return [file for path in [*given, work / WRITTEN, work / SAMPLES] for file in _files(path)]


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _found(root: Path, name: str) -> str:
    """A path below `root` if it is there, else the name of a dataset."""
    return str(root / name) if name.endswith(".jsonl") or (root / name).exists() else name


def collect_samples(
    config: RunConfig, target: Target, prompts: list[Prompt], output: Path, progress: Progress
) -> Sequence[Sample]:
    """Answers of the target to every prompt, marked as complete; resumes what an earlier run began."""
    data = config.data
    answer(
        target,
        prompts,
        output / SAMPLES,
        greedy_share=data.greedy_share,
        temperature=data.temperature,
        max_new_tokens=data.max_new_tokens,
        max_prompt_tokens=data.max_prompt_tokens,
        batch_size=data.batch_size,
        seed=config.seed,
        max_samples=data.max_samples,
        progress=progress,
    )
    samples = load_samples(output / SAMPLES)
    mark_complete(output, len(samples))
    return samples


def evaluate_and_bundle(
    trainer: Trainer,
    samples: Sequence[Sample],
    evaluation_prompts: dict[str, list[Prompt]],
    origin: dict[str, Any],
    bundle: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Measure a trained drafter and write its bundle; returns the evaluation's rows (see evaluate_drafter)."""
    config = trainer.config
    rows = evaluate_drafter(trainer, evaluation_prompts, trainer.output, progress)
    facts = _facts(trainer, origin["target"]["name"], samples, rows)
    finish_bundle(
        bundle,
        config,
        trainer.drafter,
        trainer.target,
        trainer.vocab,
        trainer.scale_M,
        trainer.source,
        trainer.validation_samples,
        facts,
        {**origin, "facts": facts, "history": trainer.history, "earlier": earlier_runs(config.warm_start)},
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
        keys = {prompt.key for prompt in asked}  # an earlier call may have asked others
        samples = [s for s in store if s.has_anchor and s.key.partition(".")[0] in keys]
        walks = walk_drafter(trainer.objective, trainer.source, samples)
        accepted = [n for w in walks for n in w.accepted]
        looked_up = [n for s in samples for n in walk_prompt_lookup(s, block_size).accepted]
        if not accepted:
            log.warning("no answer to %s has two tokens: nothing to evaluate there", dataset)
            continue
        rows.append(
            {
                "dataset": dataset,
                "temperature": 0.0,
                "requests": len(samples),
                "accepted_length": 1 + sum(accepted) / len(accepted),
                "prompt_lookup": 1 + sum(looked_up) / len(looked_up),
                "conditional_acceptance": conditional_acceptance(walks, block_size),
            }
        )
        log.info("%s", rows[-1])
    return rows


def _authors(temperatures: Counter[str]) -> str:
    """Who wrote the answers: those that others wrote have no temperature."""
    if "unknown" not in temperatures:
        return "the target itself"
    return "others" if len(temperatures) == 1 else "the target itself and others"


def _facts(trainer: Trainer, target: str, samples: Sequence[Sample], rows: list[dict[str, Any]]) -> dict[str, Any]:
    told = [(s.domain, "unknown" if s.temperature is None else f"{s.temperature:g}", s.supervised) for s in samples]
    domains, temperatures = Counter(domain for domain, _, _ in told), Counter(heat for _, heat, _ in told)
    return {
        "target": target,
        "dtype": str(trainer.target.model.dtype).removeprefix("torch."),
        "samples": len(samples),
        "authors": _authors(temperatures),
        "answer_tokens": sum(tokens for _, _, tokens in told),
        "domains": ", ".join(f"{n} {d}" for d, n in domains.most_common()),
        "temperatures": ", ".join(f"{n} at {t}" for t, n in temperatures.most_common()),
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "hours": trainer.seconds / 3600,
        "machine": f"{torch.get_num_threads()} CPU threads ({platform.machine()})",
        "vocab_size": len(trainer.vocab.ids_V),
        "coverage": trainer.coverage,
        "eval_tokens": EVALUATION_TOKENS,
        "evaluation": rows,
    }
