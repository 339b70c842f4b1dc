"""What the measurements of this repository have in common: prompts, servers, and lists on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from dspark_serving.bench.arms import Arm, Launched
from dspark_serving.bench.workload import Dataset
from dspark_serving.drafters import read_spec
from dspark_serving.errors import OptionError

T = TypeVar("T")

_PROMPTS = Path(__file__).parent / "prompts"

DATASETS = {
    "gsm8k": Dataset("gsm8k", _PROMPTS / "gsm8k_test.jsonl"),
    "humaneval": Dataset("humaneval", _PROMPTS / "humaneval.jsonl"),
    "chat": Dataset("chat", _PROMPTS / "chat.jsonl"),
}


def dspark_options(drafter: Path) -> tuple[str, ...]:
    """Options of a server with a drafter."""
    return ("--speculative-algorithm", read_spec(drafter).family, "--speculative-draft-model-path", str(drafter))


def ngram_arm(target: Path, drafter: Path, *options: str) -> Arm:
    """SGLang's own NGRAM with chains of as many tokens as the drafter's block."""
    ngram = ("--speculative-algorithm", "NGRAM", "--speculative-ngram-max-bfs-breadth", "1")
    as_many = ("--speculative-num-draft-tokens", str(read_spec(drafter).gamma + 1))
    exact = ("--decode-log-interval", "1")  # SGLang counts accepted tokens at its log lines only
    return Arm("ngram", Launched(target, (*ngram, *as_many, *exact, *options)), family="ngram", greedy_only=True)


def chosen(option: str, text: str, known: Mapping[str, T]) -> dict[str, T]:
    """What a comma-separated list names, each once, in its order.

    Raises:
        OptionError: something is not known.
    """
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            expected = f"a list of {', '.join(known)}"
            raise OptionError(f"{option} {text} names {name!r}", expected=expected, fix="Separate them by commas.")
    return {name: known[name] for name in names}
