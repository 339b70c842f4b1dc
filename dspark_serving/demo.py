"""The demo: the same questions to the same server with a DSpark drafter and without speculation."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dspark_serving.assets import Dtype, ensure_smollm2, shipped_bundle
from dspark_serving.assets.store import Report, cache_root
from dspark_serving.config import flag
from dspark_serving.errors import EnvironmentMismatchError
from dspark_serving.server import Answer, running_server

PROMPTS = (
    "A baker makes 24 muffins an hour and sells each for 2 dollars. He bakes for 6 hours and throws 14 muffins away. "
    "How many dollars does he earn? Think step by step.",
    "Write a Python function that counts the vowels in a string, with a short docstring.",
    "Give me three short tips for sleeping better.",
)
_MAX_TOKENS = 128


class Arm(NamedTuple):
    """The answers of one server, in the order of PROMPTS."""

    name: str
    answers: tuple[Answer, ...]

    @property
    def tokens_per_second(self) -> float:
        """One request at a time, prefill included."""
        return sum(a.output_tokens for a in self.answers) / sum(a.seconds for a in self.answers)

    @property
    def accepted_length(self) -> float | None:
        """Tokens a round over all answers, bonus token included; None without speculation."""
        rounds = [a.rounds for a in self.answers if a.rounds is not None]
        if not rounds:
            return None
        return sum(a.output_tokens - 1 for a in self.answers) / max(sum(rounds), 1)


class Comparison(NamedTuple):
    """What the demo shows."""

    dspark: Arm
    plain: Arm

    @property
    def equal_texts(self) -> int:
        """On how many prompts both arms gave the same text."""
        pairs = zip(self.dspark.answers, self.plain.answers, strict=True)
        return sum(ours.text == theirs.text for ours, theirs in pairs)


def run_demo(dtype: Dtype, *, bundle: Path | None, report: Report) -> Comparison:
    """Launch both servers, one after the other, and ask each every prompt.

    Args:
        dtype: of the target. Texts must be equal in fp32; in bf16 a near-tie may fall the other way.
        bundle: drafter to serve; None is the shipped one.
        report: told what is being done.

    Raises:
        DsparkError: the target cannot be made, the drafter is missing, or a server does not serve.
    """
    drafter = bundle or shipped_bundle()
    target = ensure_smollm2(dtype, report=report)
    speculation = ["--speculative-algorithm", "dspark", "--speculative-draft-model-path", str(drafter)]
    dspark = _ask("dspark", target, speculation, report)
    if dspark.accepted_length is None:
        raise EnvironmentMismatchError(
            "the server with --speculative-algorithm dspark answered without speculation",
            expected="its answers to report rounds",
            fix=f"Its log is {_log_of('dspark')}.",
        )
    return Comparison(dspark, _ask("plain", target, [*speculation, flag("disable")], report))


def _ask(name: str, target: Path, options: list[str], report: Report) -> Arm:
    report(f"starting the {name} server (about a minute; log: {_log_of(name)})")
    with running_server(target, options, log=_log_of(name)) as server:
        server.chat("Hello!", max_tokens=8)  # first-time costs belong to neither arm's figures
        report(f"asking the {name} server {len(PROMPTS)} questions")
        return Arm(name, tuple(server.chat(prompt, max_tokens=_MAX_TOKENS) for prompt in PROMPTS))


def _log_of(name: str) -> Path:
    return cache_root() / "logs" / f"demo-{name}.log"
