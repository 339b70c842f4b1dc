"""The model card of a bundle: what it is, how it was made, what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dspark_serving.drafters import DrafterSpec
from dspark_serving.drafters.spec import Family
from dspark_training.bundle.calibrate import FittedConfidence
from dspark_training.bundle.lineage import told
from dspark_training.config import RunConfig

_NAMES: dict[str, str] = {"dspark": "DSpark", "dflash": "DFlash", "eagle3": "Eagle3"}
QUALITY_TITLE = "\n## Measured: predicted survival of drafts against what was accepted"
_CARD = """---
license: {licence}
base_model: {target}
tags: [speculative-decoding, {algorithm}]
---
# {name} drafter for {target}

Drafts {block_size} tokens a round for SGLang with the dspark-serving plugin. Weights in bfloat16, without the target's
embedding and output head (they are shared at run time). `draft_vocab.json`, if there is one, names the tokens that a
draft may contain: {vocab_size} of the target's, {coverage:.2%} of the training answers' tokens. `manifest.json` has
size and SHA-256 of every file (`dspark bundle verify`). Licence: {licence}; the data and the target have their own.

## How it was trained
- Network: {num_layers} layers on the hidden states of target layers {layers}; {heads}.
- Data: {samples} answers by {authors} ({answer_tokens:,} tokens; {domains}); by temperature:
  {temperatures}.
- Start: {start}. Objective: {objective}.
- {steps} optimizer steps, {tokens:,} target tokens run, {hours:.2f} hours of training on {machine}.{earlier}

## Measured: accepted length, bonus token included, temperature 0
{table}

Greedy answers of up to {eval_tokens} tokens on prompts that were not trained on, {dtype} target, walked round by round.
"Prompt lookup" copies what followed the last 3-, 2- or 1-gram match, same number of drafts a round, same answers.
These figures hold for these prompts; expect less on other domains.
{confidence}"""
_IMPORTED = """---
tags: [speculative-decoding, {family}]
---
# {name} drafter, imported from {source}

The same drafter under this project's names, in bfloat16, for SGLang with the dspark-serving plugin: {gamma} tokens a
round on the hidden states of target layers {layers}. It was read as a checkpoint of the format {format}
({architecture}); {copies}.
Nothing was trained or measured here; its licence and figures are those of the original.
{confidence}"""


def write_card(config: RunConfig, facts: dict[str, Any], earlier: list[dict[str, Any]]) -> str:
    """Fill the card of a trained drafter.

    Args:
        facts: the figures that the run measured (see run.py); `confidence` (of `quality_section`) may lack.
        earlier: runs that the weights went through before (see lineage.py).
    """
    rows = ["| prompts | answers | drafter | prompt lookup | acceptance by position, given the one before |"]
    rows += ["|---|---|---|---|---|"]
    for row in facts["evaluation"]:
        conditional = " ".join("-" if x is None else f"{x:.2f}" for x in row["conditional_acceptance"])
        rows.append(
            f"| {row['dataset']} | {row['requests']} | **{row['accepted_length']:.2f}** | "
            f"{row['prompt_lookup']:.2f} | {conditional} |"
        )
    drafter = config.drafter
    given = {"confidence": ""} | {k: v for k, v in facts.items() if k != "evaluation"}
    return _CARD.format(
        name=_NAMES[config.algorithm],
        algorithm=config.algorithm,
        block_size=drafter.block_size,
        num_layers=1 if config.algorithm == "eagle3" else drafter.num_layers,
        layers=list(drafter.target_layer_ids),
        heads=_heads(config),
        objective=_objective(config),
        start=_start(config),
        earlier=told(earlier),
        licence=config.licence,
        table="\n".join(rows),
        **given,
    )


def import_card(spec: DrafterSpec, original: DrafterSpec, kept: list[str], confidence: str = "") -> str:
    """Fill the card of an imported drafter.

    Args:
        original: its description before the import.
        kept: canonical names of copies that differ from the target's.
    """
    differing = f"it keeps {' and '.join(kept)}, which differ from the target's"
    return _IMPORTED.format(
        name=_NAMES[spec.family],
        family=spec.family,
        source=original.path.resolve().name,
        gamma=spec.gamma,
        layers=list(spec.target_layer_ids),
        format=original.format,
        architecture=original.architecture,
        copies=differing if kept else "copies of the target's weights were left out",
        confidence=confidence,
    )


def quality_section(fitted: FittedConfidence, answers: int) -> str:
    """A section on the confidences: how well they predicted the survival up to each position."""
    rows = ["| up to position | labels | ECE, nothing fitted | ECE, fitted | AUROC, nothing fitted | AUROC, fitted |"]
    rows += ["|---|---|---|---|---|---|"]
    for position, (old, new) in enumerate(zip(fitted.before, fitted.after, strict=True), start=1):
        errors, ranks = f"{old.ece:.3f} | {new.ece:.3f}", f"{old.auroc:.2f} | {new.auroc:.2f}"
        rows.append(f"| {position} | {new.labels} | {errors} | {ranks} |")
    mapped = fitted.confidence.survival_map is not None
    judge = "survival_map.json, from their distributions" if mapped else "the confidence head"
    return (
        f"{QUALITY_TITLE}\n"
        + "\n".join(rows)
        + f"\n\nRounds on {answers} answers that were not trained on; fitted to every other one, scored on the rest.\n"
        f"What ships is fitted to all of them; drafts are judged by {judge}.\n"
    )


def _heads(config: RunConfig) -> str:
    algorithm: Family = config.algorithm
    drafter = config.drafter
    if algorithm != "dspark":
        return "no heads"
    confidence = "confidence head" if drafter.confidence_head else "no confidence head"
    return f"{drafter.markov_head_type} Markov head of rank {drafter.markov_rank}; {confidence}"


def _start(config: RunConfig) -> str:
    if config.warm_start is None:
        return "new weights"
    what = {"all": "all weights", "heads": "the heads", "backbone": "the backbone"}[config.warm_start.part]
    return f"{what} of the drafter `{Path(config.warm_start.path).name}`"


def _objective(config: RunConfig) -> str:
    optim = config.optim
    if config.algorithm == "eagle3":
        return "soft cross-entropy to the target at each step of the chain"
    return (
        f"{optim.ce_weight} CE + {optim.l1_weight} L1 + {optim.confidence_weight} confidence, position weights "
        f"exp(-k/{optim.position_decay:g})"
    )
