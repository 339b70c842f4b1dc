"""The exact distribution of a short sampled text, by transformers and the definitions of the filters."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

Text = tuple[int, ...]
LEAST_EXPECTED = 10.0
"""Cells that are expected less often are counted together."""


@torch.no_grad()
def of_text(
    target: Path,
    prompt: list[int],
    tokens: int,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> dict[Text, float]:
    """Probability of every possible text of that many tokens after the prompt."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    texts: dict[Text, float] = {(): 1.0}
    for _ in range(tokens):
        logits = model(torch.tensor([[*prompt, *text] for text in texts])).logits[:, -1]
        longer: dict[Text, float] = {}
        for (text, weight), row in zip(texts.items(), logits, strict=True):
            probs = kept((row.double() / temperature).softmax(-1), top_k or len(row), top_p, min_p)
            longer |= {(*text, i): weight * float(probs[i]) for i in probs.nonzero().flatten().tolist()}
        texts = {text: weight for text, weight in longer.items() if weight > 1e-9}
    return texts


def kept(probs: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """What the filters, each applied to the whole distribution, leave of it, with sum 1."""
    found, above = torch.zeros_like(probs), 0.0
    for rank, index in enumerate(probs.argsort(descending=True).tolist()):
        if rank >= top_k or above > top_p or probs[index] < min_p * probs.max():
            break
        found[index] = probs[index]
        above += float(probs[index])
    return found / found.sum()


def chi_square(found: list[Text], expected: dict[Text, float]) -> float:
    """P-value of Pearson's test; 0 for a text that is impossible.

    Args:
        expected: probabilities, which may leave out a rest of less than 1e-6.
    """
    if not set(found) <= set(expected):
        return 0.0
    counts = Counter(found)
    cells = {text: weight * len(found) for text, weight in expected.items()}
    frequent = [text for text, count in cells.items() if count >= LEAST_EXPECTED]
    pairs = [(counts[text], cells[text]) for text in frequent]
    rest = len(found) - sum(count for _, count in pairs)
    pairs.append((len(found) - sum(count for count, _ in pairs), rest))
    statistic = sum((observed - count) ** 2 / count for observed, count in pairs if count > 0)
    freedom = len(frequent) - (rest < LEAST_EXPECTED)
    return float(torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2, dtype=torch.double)))
