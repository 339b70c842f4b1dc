"""The model card of a bundle: what it is, how it was made, what was measured."""

from __future__ import annotations

from typing import Any

from dspark_training.config import RunConfig

_CARD = """---
license: apache-2.0
base_model: {target}
tags: [speculative-decoding, dspark]
---
# DSpark drafter for {target}

Drafts {block_size} tokens a round for SGLang with the dspark-serving plugin. Weights: DeepSpec's key and field names,
bfloat16, without the target's embedding and output head (they are shared at run time). `draft_vocab.json` names the
{vocab_size} target tokens a draft may contain ({coverage:.2%} of the training answers' tokens).

## How it was trained
- Backbone: {num_layers} layers on the hidden states of target layers {layers}; vanilla Markov head of rank {rank};
  confidence head.
- Data: {samples} answers by the target itself ({answer_tokens:,} tokens; {domains}); {greedy:.0%} decoded greedily,
  the rest at temperature {temperature}. Prompts: GSM8K train questions (MIT licence), and chat and code prompts
  written by the target.
- Objective: {ce} CE + {l1} L1 + {conf} confidence, position weights exp(-k/{decay:g}).
- {steps} optimizer steps, {tokens:,} target tokens run, {hours:.2f} hours of training on {machine}.

## Measured: accepted length, bonus token included, temperature 0
{table}

Greedy answers of up to {eval_tokens} tokens on prompts that were not trained on, {dtype} target, walked round by round.
"Prompt lookup" copies what followed the last 3-, 2- or 1-gram match, same number of drafts a round, same answers.
These are small-model figures on short answers; expect less on other domains.
"""


def write_card(config: RunConfig, facts: dict[str, Any]) -> str:
    """Fill the card; `facts` are the figures that the run measured (see run.py)."""
    rows = ["| prompts | answers | drafter | prompt lookup | acceptance by position, given the one before |"]
    rows += ["|---|---|---|---|---|"]
    for row in facts["evaluation"]:
        conditional = " ".join(f"{x:.2f}" for x in row["conditional_acceptance"])
        rows.append(
            f"| {row['dataset']} | {row['requests']} | **{row['accepted_length']:.2f}** | "
            f"{row['prompt_lookup']:.2f} | {conditional} |"
        )
    drafter, optim, data = config.drafter, config.optim, config.data
    return _CARD.format(
        block_size=drafter.block_size,
        num_layers=drafter.num_layers,
        layers=list(drafter.target_layer_ids),
        rank=drafter.markov_rank,
        greedy=data.greedy_share,
        temperature=data.temperature,
        ce=optim.ce_weight,
        l1=optim.l1_weight,
        conf=optim.confidence_weight,
        decay=optim.position_decay,
        table="\n".join(rows),
        **{k: v for k, v in facts.items() if k != "evaluation"},
    )
