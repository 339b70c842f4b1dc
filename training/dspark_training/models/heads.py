"""Heads of a DSpark drafter (arXiv 2607.05147): how a token depends on the one before it, and how sure it is.

Shapes: K rows of a block, D hidden size, R Markov rank, V vocabulary; `...` stands for any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MarkovHead(nn.Module):
    """Vanilla: a low-rank bigram bias B(x_{k-1}, .) = W2 W1[x_{k-1}]."""

    def __init__(self, vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)

    def latent(self, hidden_KD: Tensor, previous_K: Tensor) -> Tensor:
        """What W2 is applied to: [..., K, R], teacher-forced on the token before each row.

        Args:
            hidden_KD: [..., K, D] of the backbone.
            previous_K: [..., K] ids of the tokens before each row's prediction.
        """
        return self.markov_w1(previous_K)


class GatedMarkovHead(MarkovHead):
    """Gated: W2 (sigmoid(Wg [h; e]) * e) with e = W1[x_{k-1}]."""

    def __init__(self, vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_size, rank, hidden_size)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def latent(self, hidden_KD: Tensor, previous_K: Tensor) -> Tensor:
        e_KR = self.markov_w1(previous_K)
        return torch.sigmoid(self.gate_proj(torch.cat([hidden_KD, e_KR.to(hidden_KD.dtype)], -1))) * e_KR


class RnnMarkovHead(MarkovHead):
    """Recurrent: [s; e; h] -> (g, c, o), s' = sigmoid(g) s + (1 - sigmoid(g)) tanh(c), bias W2 tanh(o), s_0 = 0."""

    def __init__(self, vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_size, rank, hidden_size)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def latent(self, hidden_KD: Tensor, previous_K: Tensor) -> Tensor:
        e_KR = self.markov_w1(previous_K)
        state_R = torch.zeros_like(e_KR[..., 0, :])
        rows = []
        for k in range(e_KR.shape[-2]):
            row = torch.cat([state_R, e_KR[..., k, :], hidden_KD[..., k, :].to(e_KR.dtype)], -1)
            gate_R, candidate_R, out_R = self.joint_proj(row).chunk(3, -1)
            keep_R = torch.sigmoid(gate_R)
            state_R = keep_R * state_R + (1 - keep_R) * torch.tanh(candidate_R)
            rows.append(torch.tanh(out_R))
        return torch.stack(rows, -2)


MARKOV_HEADS: dict[str, type[MarkovHead]] = {
    "vanilla": MarkovHead,
    "gated": GatedMarkovHead,
    "rnn": RnnMarkovHead,
}


class ConfidenceHead(nn.Module):
    """c_k = sigmoid(w . [h_k; W1[x_{k-1}]] + b): x_k survives, given that x_<k did. It never sees x_k itself."""

    def __init__(self, hidden_size: int, markov_rank: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size + markov_rank, 1)

    def forward(self, hidden_KD: Tensor, latent_KR: Tensor | None) -> Tensor:
        """Logits [..., K]; `latent_KR` is W1[x_{k-1}], None for a head without it."""
        parts = [hidden_KD] if latent_KR is None else [hidden_KD, latent_KR.to(hidden_KD.dtype)]
        return self.proj(torch.cat(parts, dim=-1)).squeeze(-1)
