"""What a drafter's logits are worth against the target's, over the whole draft vocabulary, in chunks of rows.

The gradient is computed together with the values, chunk by chunk: so the logits of a chunk are computed once, and
neither the draft's nor the target's are ever there for all rows. That takes weights that are known beforehand, which
losses linear in their rows have. Divergences, softmaxes and sums are in fp32 whatever the logits were computed in:
in bf16 the gradients are 19-31 % off near acceptance 0.98 (speculators PR 788).

Shapes: N rows, P target positions (several rows may share one), C rows of a chunk, V draft vocabulary, D and E hidden
sizes of draft and target, R rank of the second term.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dspark_kernels.row_terms import Chunk, row_terms

_CPU_CHUNK, _CHUNK = 2**19, 2**26  # logits of the draft at once, on a CPU and on an accelerator
_MIN_ROWS = 32


class DraftRows(NamedTuple):
    """Draft logits in factors: cap(hidden @ head.T) + latent @ w2.T. Every tensor here may ask for a gradient."""

    hidden_ND: Tensor
    head_VD: Tensor
    latent_NR: Tensor | None = None
    w2_VR: Tensor | None = None
    soft_cap: float | None = None  # x -> cap * tanh(x / cap), Gemma


class TargetRows(NamedTuple):
    """Target probabilities in factors: exp(cap(hidden @ head.T) - normaliser). No gradient."""

    hidden_PE: Tensor
    head_VE: Tensor  # rows of the draft vocabulary only
    normaliser_P: Tensor  # log sum exp over the target's whole vocabulary; inf counts as no mass at all
    position_N: Tensor  # which of the P positions a draft row belongs to
    soft_cap: float | None = None


class RowWeights(NamedTuple):
    """Share of each row's terms in the total."""

    ce_N: Tensor | None = None
    l1_N: Tensor | None = None
    soft_ce_N: Tensor | None = None


class RowValues(NamedTuple):
    """Every row's terms, without gradient."""

    ce_N: Tensor  # -log p_draft(label); 0 where the label is -1
    l1_N: Tensor  # sum_v |p_draft - p_target|, the target's mass outside the draft vocabulary included
    soft_ce_N: Tensor  # -sum_v p_target log p_draft
    top_N: Tensor  # the draft's greedy column


def vocabulary_loss(
    draft: DraftRows, target: TargetRows, labels_N: Tensor, weights: RowWeights
) -> tuple[Tensor, RowValues]:
    """Weighted sum of cross-entropy, L1 and soft cross-entropy over rows, and the values behind it.

    Under autocast the draft's products take its dtype, the target's keep their own.

    Args:
        draft: of the N rows.
        target: of the P positions behind them.
        labels_N: draft column of the label, -1 outside: such a row has no cross-entropy.
        weights: a term without weights counts for nothing in the total; its values are there all the same.
    """
    device, dtype = draft.hidden_ND.device.type, draft.hidden_ND.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    wanted = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        total, *values = _VocabularyLoss.apply(*draft[:4], draft.soft_cap, target, labels_N, weights, dtype, wanted)
    return total, RowValues(*values)


class _VocabularyLoss(torch.autograd.Function):
    """Takes the gradients on its way forward; its backward only scales them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        hidden_ND, head_VD, latent_NR, w2_VR, soft_cap, target, labels_N, weights, dtype, wanted = arguments
        wants = [wanted and needed for needed in ctx.needs_input_grad[:4]]
        base = _Product(hidden_ND, head_VD, dtype, *wants[:2])
        bias = None if latent_NR is None else _Product(latent_NR, w2_VR, dtype, *wants[2:])
        precision = torch.promote_types(dtype, torch.float32)
        terms_3N = torch.empty(3, len(labels_N), dtype=precision, device=labels_N.device)
        top_N = torch.empty_like(labels_N)
        weights_3N = torch.stack([torch.zeros_like(terms_3N[0]) if w is None else w.to(precision) for w in weights])
        for rows_C, positions_U, owner_C in _chunks(target.position_N, len(head_VD)):
            logits_CV, slope_CV = _cap(base.rows(rows_C).to(precision), soft_cap)
            if bias is not None:
                logits_CV += bias.rows(rows_C)
            target_UV = target.hidden_PE[positions_U].to(target.head_VE.dtype) @ target.head_VE.T
            chunk = Chunk(
                logits_CV,
                _cap(target_UV.to(precision), target.soft_cap)[0],
                target.normaliser_P[positions_U].to(precision),
                owner_C,
                labels_N[rows_C],
                weights_3N[:, rows_C],
            )
            terms_3N[:, rows_C], top_N[rows_C] = row_terms(chunk, any(wants))
            if bias is not None:
                bias.send_back(rows_C, logits_CV)
            base.send_back(rows_C, logits_CV if slope_CV is None else logits_CV.mul_(slope_CV))
        ctx.save_for_backward(*base.gradients(), *((None, None) if bias is None else bias.gradients()))
        values = (*terms_3N, top_N)
        ctx.mark_non_differentiable(*values)
        return (weights_3N * terms_3N).sum(), *values

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if gradient is None else gradient * upstream[0] for gradient in ctx.saved_tensors)
        return *scaled, None, None, None, None, None, None


class _Product:
    """x @ y.T for some rows at a time, and the gradients of both where they are asked for."""

    def __init__(self, x_NK: Tensor, y_VK: Tensor, dtype: torch.dtype, wants_x: bool, wants_y: bool) -> None:
        self._x_NK, self._y_VK = x_NK, y_VK.to(dtype)
        self._dx_NK = torch.empty_like(x_NK) if wants_x else None
        precision = torch.promote_types(y_VK.dtype, torch.float32)
        self._dy_VK = torch.zeros_like(y_VK, dtype=precision) if wants_y else None
        self._y_dtype = y_VK.dtype

    def rows(self, rows_C: Tensor) -> Tensor:
        """The product [C, V] of these rows."""
        return self._x_NK[rows_C].to(self._y_VK.dtype) @ self._y_VK.T

    def send_back(self, rows_C: Tensor, gradient_CV: Tensor) -> None:
        """Take in the gradient of the product of these rows; every row comes once."""
        gradient_CV = gradient_CV.to(self._y_VK.dtype)
        if self._dx_NK is not None:
            self._dx_NK[rows_C] = (gradient_CV @ self._y_VK).to(self._dx_NK.dtype)
        if self._dy_VK is not None:
            self._dy_VK += gradient_CV.T @ self._x_NK[rows_C].to(gradient_CV.dtype)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of x and y."""
        return self._dx_NK, None if self._dy_VK is None else self._dy_VK.to(self._y_dtype)


def _cap(logits_CV: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Capped logits and the slope of the cap there."""
    if soft_cap is None:
        return logits_CV, None
    tanh_CV = torch.tanh(logits_CV / soft_cap)
    return tanh_CV * soft_cap, 1 - tanh_CV.square()


def _chunks(position_N: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows that lie together in the target, their distinct positions, and which of these each row has."""
    size = max(_MIN_ROWS, (_CPU_CHUNK if position_N.device.type == "cpu" else _CHUNK) // vocabulary)
    positions_P, inverse_N = torch.unique(position_N, return_inverse=True)
    order_N = inverse_N.argsort()
    owner_N = inverse_N[order_N]
    for rows_C, owner_C in zip(order_N.split(size), owner_N.split(size), strict=True):
        first, last = torch.stack((owner_C[0], owner_C[-1])).tolist()
        yield rows_C, positions_P[first : last + 1], owner_C - first
