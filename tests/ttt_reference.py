"""EAGLE-3's training-time test by its definition: whole sequences, one at a time, under the published mask.

Plain tensors of a drafter with Llama's widths as `make_eagle3` writes it (6 query heads, 2 key-value heads, width 16,
epsilon 1e-5); imports nothing of the training package. Shapes: T tokens, S rows of all passes so far, H and G heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel

STEPS = 4
Sees = Callable[[int, int, int, int], bool]  # (query index, query pass, key index, key pass)


def published_mask(i: int, s: int, j: int, r: int) -> bool:
    """The first pass is causal; of later passes a row sees its own index, up to now."""
    return j <= i if r == 0 else j == i and r <= s


def looks_ahead(i: int, s: int, j: int, r: int) -> bool:
    """The mistake of seeing one row too many of the first pass."""
    return j <= i + 1 if r == 0 else j == i and r <= s


class Ttt:
    """EAGLE-3's objective by its definition on plain tensors; imports nothing of the package's model."""

    def __init__(
        self, weights: dict[str, Tensor], model: PreTrainedModel, layer_ids: tuple[int, ...], allowed: list[int]
    ) -> None:
        self.weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
        self._model, self._layer_ids, self._allowed = model, layer_ids, torch.tensor(allowed)

    def loss(self, ids: list[list[int]], anchors: list[list[int]], sees: Sees = published_mask) -> Tensor:
        """Sum of 0.8^s CE over the chains whose first row is anchor - 1, as a mean by weight; ids are unpadded."""
        total, weight = torch.zeros(()), 0.0
        for row, chosen in zip(ids, anchors, strict=True):
            logits_T, features_TM = self.run_target(row)
            outputs = self.passes(row, features_TM, sees)
            for anchor in chosen:
                for s in range(min(STEPS, len(row) - 1 - anchor)):
                    i = anchor - 1  # pass s of row i predicts token i + 2 + s
                    target_p = logits_T[i + 1 + s].softmax(-1)[self._allowed]
                    if int(logits_T[i + 1 + s].argmax()) not in self._allowed.tolist():
                        continue
                    head = self._model.get_output_embeddings().weight[self._allowed]
                    log_q = (head @ outputs[s][i]).log_softmax(-1)
                    total = total - 0.8**s * (target_p * log_q).sum()
                    weight += 0.8**s
        return total / weight

    @torch.no_grad()
    def run_target(self, row: list[int]) -> tuple[Tensor, Tensor]:
        out = self._model(torch.tensor([row]), output_hidden_states=True)
        return out.logits[0], torch.cat([out.hidden_states[i + 1][0] for i in self._layer_ids], -1)

    def passes(self, row: list[int], features_TM: Tensor, sees: Sees) -> list[Tensor]:
        """Normed output of every pass, [T, D] each; ids shift by one from pass to pass."""
        length, w = len(row), self.weights
        hidden_TD = linear(features_TM, w["fc.weight"])
        keys: list[Tensor] = []
        values: list[Tensor] = []
        normed = []
        for s in range(STEPS):
            tokens = [*row[1 + s :], *[0] * (1 + s)]
            embeds_TD = self._model.get_input_embeddings().weight[tokens]
            wide = torch.cat([self._norm(embeds_TD, "input_layernorm"), self._norm(hidden_TD, "hidden_norm")], -1)
            q, k, v = (linear(wide, w[f"layers.0.self_attn.{n}_proj.weight"]).view(length, -1, 16) for n in "qkv")
            q, k = self._norm(q, "self_attn.q_norm"), self._norm(k, "self_attn.k_norm")
            keys.append(self._rotate(k, s))
            values.append(v)
            seen = [[sees(i, s, j, r) for r in range(s + 1) for j in range(length)] for i in range(length)]
            attended = self._attend(self._rotate(q, s), torch.cat(keys), torch.cat(values), torch.tensor(seen))
            hidden_TD = hidden_TD + linear(attended, w["layers.0.self_attn.o_proj.weight"])
            inner = self._norm(hidden_TD, "post_attention_layernorm")
            gate, up = (linear(inner, w[f"layers.0.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
            hidden_TD = hidden_TD + linear(silu(gate) * up, w["layers.0.mlp.down_proj.weight"])
            normed.append(self._norm(hidden_TD, None))
        return normed

    def _attend(self, q_THE: Tensor, k_SGE: Tensor, v_SGE: Tensor, seen_TS: Tensor) -> Tensor:
        heads = []
        for head in range(6):
            scores = q_THE[:, head] @ k_SGE[:, head // 3].T / 4.0
            heads.append(scores.masked_fill(~seen_TS, float("-inf")).softmax(-1) @ v_SGE[:, head // 3])
        return torch.cat(heads, -1)

    def _rotate(self, x_THE: Tensor, first: int) -> Tensor:
        """Row i of pass s stands at position i + s; pairs (e, e + 8) of the head turn together."""
        frequency = 10000.0 ** (-torch.arange(8) / 8)
        angles = (first + torch.arange(len(x_THE)))[:, None, None] * frequency
        low, high = x_THE[..., :8], x_THE[..., 8:]
        return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)

    def _norm(self, x: Tensor, name: str | None) -> Tensor:
        weight = self.weights["norm.weight" if name is None else f"layers.0.{name}.weight"]
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
