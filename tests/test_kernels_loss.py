"""The vocabulary-sized loss: values and gradients against the plain formula, and what it never holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dspark_kernels import vocabulary_loss as op
from dspark_kernels.vocabulary_loss import DraftRows, RowValues, RowWeights, TargetRows, vocabulary_loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROWS, POSITIONS, VOCAB, DRAFT, TARGET, RANK = 70, 23, 37, 8, 6, 3
BEYOND = 11  # columns of the target outside the draft vocabulary
Case = tuple[DraftRows, TargetRows, Tensor, RowWeights]


def make_case(
    seed: int = 0, rows: int = ROWS, dtype: torch.dtype = torch.float32, *, bias: bool = True, cap: float | None = None
) -> Case:
    """Rows in no order, several of a position; one position has no mass, some labels lie outside."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    hidden_PE, whole_TE = normal(POSITIONS, TARGET), normal(VOCAB + BEYOND, TARGET)
    logits_PT = hidden_PE @ whole_TE.T
    normaliser_P = (logits_PT if cap is None else cap * torch.tanh(logits_PT / cap)).logsumexp(-1)
    normaliser_P[3] = torch.inf
    draft = DraftRows(
        normal(rows, DRAFT).requires_grad_(),
        normal(VOCAB, DRAFT).requires_grad_(),
        normal(rows, RANK).requires_grad_() if bias else None,
        normal(VOCAB, RANK).requires_grad_() if bias else None,
        cap,
    )
    position_N = torch.randint(0, POSITIONS, (rows,), generator=g)
    target = TargetRows(hidden_PE, whole_TE[:VOCAB], normaliser_P, position_N, cap)
    weights = RowWeights(*(torch.rand(rows, generator=g).to(dtype) for _ in range(3)))
    return draft, target, torch.randint(-1, VOCAB, (rows,), generator=g), weights


def plain(draft: DraftRows, target: TargetRows, labels_N: Tensor, weights: RowWeights) -> tuple[Tensor, RowValues]:
    """The formula as it is written, over whole tensors."""

    def capped(logits: Tensor, cap: float | None) -> Tensor:
        return logits if cap is None else cap * torch.tanh(logits / cap)

    logits_NV = capped(draft.hidden_ND @ draft.head_VD.T, draft.soft_cap)
    if draft.latent_NR is not None and draft.w2_VR is not None:
        logits_NV = logits_NV + draft.latent_NR @ draft.w2_VR.T
    target_PV = torch.exp(capped(target.hidden_PE @ target.head_VE.T, target.soft_cap) - target.normaliser_P[:, None])
    p_NV, log_q_NV = target_PV[target.position_N], torch.log_softmax(logits_NV, -1)
    ce_N = torch.stack([-q[label] if label >= 0 else 0 * q[0] for q, label in zip(log_q_NV, labels_N, strict=True)])
    l1_N = (log_q_NV.exp() - p_NV).abs().sum(-1) + 1 - p_NV.sum(-1)
    soft_ce_N = -(p_NV * log_q_NV).sum(-1)
    terms = zip(weights, (ce_N, l1_N, soft_ce_N), strict=True)
    total = sum(((w * term).sum() for w, term in terms if w is not None), torch.zeros((), dtype=ce_N.dtype))
    return total, RowValues(ce_N, l1_N, soft_ce_N, logits_NV.argmax(-1))


def gradients(total: Tensor, draft: DraftRows) -> list[Tensor]:
    return list(torch.autograd.grad(total, [t for t in draft[:4] if t is not None]))


def only(weights: RowWeights, term: str) -> RowWeights:
    return RowWeights(**{term: getattr(weights, term)})


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_CPU_CHUNK", 1)  # the least number of rows a chunk: three chunks here


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"cap": 4.0}, {"cap": 4.0, "bias": False}, {"rows": 1}], ids=str
)
@pytest.mark.parametrize("term", ["all", *RowWeights._fields])
def test_values_and_gradients_are_those_of_the_formula(term: str, options: dict[str, Any]) -> None:
    draft, target, labels_N, weights = make_case(dtype=torch.float64, **options)
    weights = weights if term == "all" else only(weights, term)
    total, values = vocabulary_loss(draft, target, labels_N, weights)
    want_total, want_values = plain(draft, target, labels_N, weights)
    torch.testing.assert_close(total, want_total)
    for value_N, want_N in zip(values, want_values, strict=True):
        torch.testing.assert_close(value_N, want_N.detach())
        assert not value_N.requires_grad
    for got, want in zip(gradients(3 * total, draft), gradients(3 * want_total, draft), strict=True):
        torch.testing.assert_close(got, want)


def test_the_gradient_is_that_of_the_values() -> None:
    draft, target, labels_N, weights = make_case(rows=5, dtype=torch.float64)

    def total(hidden_ND: Tensor, head_VD: Tensor, latent_NR: Tensor, w2_VR: Tensor) -> Tensor:
        return vocabulary_loss(DraftRows(hidden_ND, head_VD, latent_NR, w2_VR), target, labels_N, weights)[0]

    assert torch.autograd.gradcheck(total, [t for t in draft[:4] if isinstance(t, Tensor)])


def test_divergences_are_in_fp32_under_bf16_autocast() -> None:
    """Near full acceptance, with logits that bf16 can hold: what is left is the rounding of the gradient's product."""
    g = torch.Generator().manual_seed(1)
    logits_NV = torch.randn(ROWS, VOCAB, generator=g).bfloat16().float().requires_grad_()
    near_NV = torch.log_softmax(logits_NV.detach() + 0.02 * torch.randn(ROWS, VOCAB, generator=g), -1)
    same_VV, weights = torch.eye(VOCAB), RowWeights(l1_N=torch.ones(ROWS))
    draft = DraftRows(logits_NV, same_VV)
    target = TargetRows(near_NV, same_VV, torch.zeros(ROWS), torch.arange(ROWS))
    labels_N = torch.zeros(ROWS, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        total, values = vocabulary_loss(draft, target, labels_N, weights)
    want_total, want = plain(draft, target, labels_N, weights)
    torch.testing.assert_close(values.l1_N, want.l1_N.detach())
    exact_NV, got_NV = (torch.autograd.grad(t, logits_NV)[0] for t in (want_total, total))
    assert (got_NV - exact_NV).norm() < 0.005 * exact_NV.norm()
    rounded_NV = logits_NV.detach().bfloat16().requires_grad_()  # the control: all of it in bf16
    (rounded_NV.softmax(-1) - near_NV.bfloat16().exp()).abs().sum().backward()
    assert rounded_NV.grad is not None
    assert (rounded_NV.grad.float() - exact_NV).norm() > 0.1 * exact_NV.norm()


def test_rows_of_no_mass_and_no_weight_change_nothing() -> None:
    draft, target, labels_N, weights = make_case()
    empty_N = target.position_N == 3
    assert empty_N.any()
    _, values = vocabulary_loss(draft, target, labels_N, weights)
    torch.testing.assert_close(values.l1_N[empty_N], torch.full((int(empty_N.sum()),), 2.0))
    none = RowWeights(*(w * ~empty_N for w in weights if w is not None))
    hidden_ND = gradients(vocabulary_loss(draft, target, labels_N, none)[0], draft)[0]
    assert hidden_ND.isfinite().all()
    assert not hidden_ND[empty_N].any()
    assert hidden_ND[~empty_N].any(-1).all()


def test_a_frozen_head_gets_no_gradient_and_no_grad_takes_none() -> None:
    draft, target, labels_N, weights = make_case()
    frozen = draft._replace(head_VD=draft.head_VD.detach())
    vocabulary_loss(frozen, target, labels_N, weights)[0].backward()
    assert frozen.head_VD.grad is None
    assert draft.hidden_ND.grad is not None
    with torch.no_grad():
        total, _ = vocabulary_loss(draft, target, labels_N, weights)
    assert not total.requires_grad


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.usefixtures("small_chunks")
def test_no_tensor_of_all_rows_and_the_whole_vocabulary_exists() -> None:
    draft, target, labels_N, weights = make_case(rows=4000)
    with LargestTensor() as ours:
        vocabulary_loss(draft, target, labels_N, weights)[0].backward()
    assert ours.elements == 4000 * DRAFT  # the gradient of the hidden rows
    with LargestTensor() as control:
        plain(draft, target, labels_N, weights)
    assert control.elements >= 4000 * VOCAB
