"""Terms and gradients of rows of logits: kernel (in Triton's interpreter) and reference against the plain formula."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dspark_kernels.row_terms import Chunk, row_terms
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


def make_chunk(seed: int, rows: int = 7, vocabulary: int = 53, scale: float = 2.0) -> Chunk:
    """The vocabulary is no multiple of a tile; the last target row has no mass in it."""
    g = torch.Generator().manual_seed(seed)
    target_UV = scale * torch.randn(4, vocabulary, generator=g)
    normaliser_U = target_UV.logsumexp(-1) + torch.rand(4, generator=g)
    normaliser_U[3] = torch.inf
    return Chunk(
        scale * torch.randn(rows, vocabulary, generator=g),
        target_UV,
        normaliser_U,
        torch.randint(0, 4, (rows,), generator=g),
        torch.randint(-1, vocabulary, (rows,), generator=g),
        torch.rand(3, rows, generator=g),
    )


def equal_chunk() -> Chunk:
    """Draft and target are equal, and every logit is: the first column is greedy. |q - p| has no gradient here."""
    chunk = make_chunk(9, vocabulary=32)
    flat_UV, ones_U = torch.zeros_like(chunk.target_UV), torch.ones(4)
    return chunk._replace(
        logits_CV=torch.zeros_like(chunk.logits_CV), target_UV=flat_UV, normaliser_U=ones_U * torch.tensor(32.0).log()
    )


CASES = {
    **{f"random {seed}": make_chunk(seed) for seed in range(6)},
    "one tile": make_chunk(6, vocabulary=16),
    "less than a tile": make_chunk(7, vocabulary=5),
    "one row": make_chunk(8, rows=1),
    "large logits": make_chunk(10, scale=60.0),
    "all equal": equal_chunk(),
}


def plain(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Terms, greedy columns and autograd's gradient of the weighted sum, in double precision."""
    logits_CV = chunk.logits_CV.double().requires_grad_()
    p_CV = (chunk.target_UV.double() - chunk.normaliser_U.double()[:, None]).exp()[chunk.owner_C]
    log_q_CV = logits_CV.log_softmax(-1)
    ce_C = torch.stack([-q[i] if i >= 0 else 0 * q[0] for q, i in zip(log_q_CV, chunk.labels_C, strict=True)])
    l1_C = (log_q_CV.exp() - p_CV).abs().sum(-1) + 1 - p_CV.sum(-1)
    terms_3C = torch.stack([ce_C, l1_C, -(p_CV * log_q_CV).sum(-1)])
    (terms_3C * chunk.weights_3C).sum().backward()
    assert logits_CV.grad is not None
    return terms_3C.detach(), logits_CV.argmax(-1), logits_CV.grad


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=2e-5, atol=5e-6)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the Triton kernel gives for every case, from one process with Triton's interpreter."""
    folder = tmp_path_factory.mktemp("row_terms")
    tensors = {f"{name}.{key}": value for name, c in CASES.items() for key, value in c._asdict().items()}
    save_file(tensors, folder / "cases")
    subprocess.run(
        [sys.executable, "-m", "tests.interpreted_row_terms", folder / "cases", folder / "results"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )
    return load_file(folder / "results")


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_agrees_with_the_formula(name: str, interpreted: dict[str, Tensor]) -> None:
    terms_3C, top_C, gradient_CV = plain(CASES[name])
    close(interpreted[f"{name}.terms_3C"], terms_3C)
    assert torch.equal(interpreted[f"{name}.again_3C"], interpreted[f"{name}.terms_3C"])
    assert torch.equal(interpreted[f"{name}.top_C"], top_C)
    assert torch.equal(interpreted[f"{name}.kept"], CASES[name].logits_CV)
    if name != "all equal":
        close(interpreted[f"{name}.gradient_CV"], gradient_CV)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_agrees_with_the_formula(name: str) -> None:
    chunk = CASES[name]._replace(logits_CV=CASES[name].logits_CV.clone())
    terms_3C, top_C, gradient_CV = plain(chunk)
    values_3C, columns_C = row_terms(chunk, gradient=False)
    close(values_3C, terms_3C)
    assert torch.equal(columns_C, top_C)
    assert torch.equal(chunk.logits_CV, CASES[name].logits_CV)
    row_terms(chunk, gradient=True)
    if name != "all equal":
        close(chunk.logits_CV, gradient_CV)
