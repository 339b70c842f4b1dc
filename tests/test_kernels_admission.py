"""The device's admission and packing: kernel and reference against brute force, and fit for a captured graph."""

from __future__ import annotations

import ast
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dspark_kernels import admission
from dspark_kernels.admission import AdmissionBuffers, AdmissionInputs, admit_and_pack, admit_and_pack_torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from dspark_serving.scheduler.admission import admit, values
from dspark_serving.scheduler.survival import sanitise
from tests.interpreted_admission import OUTPUTS

ROOT = Path(__file__).resolve().parents[1]
Case = dict[str, np.ndarray]


def make_case(
    confidence_RG: np.ndarray,
    *,
    price: float = 0.0,
    capacity: int = 1000,
    live: int | None = None,
    weight_R: np.ndarray | None = None,
    line_2BG: np.ndarray | None = None,
    band_R: np.ndarray | None = None,
) -> Case:
    requests, gamma = confidence_RG.shape
    weight_R = np.ones(requests) if weight_R is None else weight_R
    if line_2BG is None:
        line_2BG = np.stack([np.ones((1, gamma)), np.zeros((1, gamma))])
    band_R = np.zeros(requests) if band_R is None else band_R
    return {
        "confidence_RG": confidence_RG.astype(np.float32),
        "factor_BG": line_2BG[0].astype(np.float32),
        "addend_BG": line_2BG[1].astype(np.float32),
        "band_R": band_R.astype(np.int32),
        "weight_R": weight_R.astype(np.float32),
        "price": np.array(price, dtype=np.float32),
        "capacity": np.array(capacity, dtype=np.int32),
        "live": np.array(requests if live is None else live, dtype=np.int32),
    }


def random_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    requests, gamma = int(rng.integers(1, 24)), int(rng.integers(1, 9))
    confidence_RG = rng.random((requests, gamma))
    if seed % 2:  # few values: many ties
        confidence_RG = rng.choice([0.0, 0.25, 0.5, 1.0], (requests, gamma))
    if seed % 3 == 0:
        bad_RG = rng.random((requests, gamma)) < 0.2
        confidence_RG[bad_RG] = rng.choice([np.nan, np.inf, -np.inf, -0.1, 1.5], int(bad_RG.sum()))
    calibration = {}
    if seed % 4 == 0:
        line_2BG = np.stack([rng.uniform(0.5, 2.0, (3, gamma)), rng.uniform(-1.0, 1.0, (3, gamma))])
        calibration = {"line_2BG": line_2BG, "band_R": rng.integers(0, 3, requests)}
    return make_case(
        confidence_RG,
        price=float(rng.choice([0.0, 0.1, 0.25, 0.6])),
        capacity=int(rng.integers(0, requests * gamma + 2)),
        live=int(rng.integers(0, requests + 1)) if seed % 5 == 0 else None,
        weight_R=rng.choice([0.5, 1.0, 2.0], requests),
        **calibration,
    )


def edge_cases() -> dict[str, Case]:
    rng = np.random.default_rng(7)
    sure_RG = np.ones((5, 3))
    return {
        "nothing fits": make_case(rng.random((6, 5)), capacity=0),
        "negative capacity": make_case(rng.random((6, 5)), capacity=-3),
        "price too high": make_case(rng.random((6, 5)), price=math.inf),
        "all padding": make_case(rng.random((6, 5)), live=0),
        "live beyond the buffers": make_case(rng.random((6, 5)), live=9),
        "one tie over all": make_case(sure_RG, capacity=7),
        "no survival, price 0": make_case(np.zeros((5, 3)), capacity=7),
        "minus zero": make_case(np.full((5, 3), -0.0), capacity=7),
        "all bad": make_case(np.full((3, 4), np.nan), capacity=5),
        "a single position": make_case(np.array([[0.3]]), price=0.3),
        "largest": make_case(rng.random((512, 15)), capacity=3000, price=0.01),
        "largest, tied": make_case(rng.choice([0.5, 1.0], (512, 15)), capacity=3000),
    }


CASES = {**{f"random {seed}": random_case(seed) for seed in range(60)}, **edge_cases()}


def brute_force(case: Case) -> dict[str, list[int]]:
    """By sorting tuples, in plain Python."""
    requests, gamma = case["confidence_RG"].shape
    live = min(int(case["live"]), requests)
    offers = []
    for r in range(live):
        value = case["weight_R"][r]
        for k in range(gamma):
            confidence, band = case["confidence_RG"][r, k], case["band_R"][r]
            factor, addend = float(case["factor_BG"][band, k]), float(case["addend_BG"][band, k])
            if not 0 <= confidence <= 1:  # also true for NaN
                confidence = np.float32(1.0)
            elif (factor, addend) != (1.0, 0.0) and 0 < confidence < 1:
                odds = (float(confidence) / (1 - float(confidence))) ** factor * math.exp(addend)
                confidence = np.float32(odds / (1 + odds))
            value = np.float32(value * confidence)
            if value >= case["price"]:
                offers.append((-value, k, r))
    kept = sorted(offers)[: max(int(case["capacity"]), 0)]
    lens = [1 + sum(r == kept_r for _, _, kept_r in kept) if r < live else 0 for r in range(requests)]
    rows = [(r, k) for r in range(requests) for k in range(lens[r])]
    padding = [-1] * (requests * (gamma + 1) - len(rows))
    return {
        "verify_lens_R": lens,
        "row_starts": [sum(lens[:r]) for r in range(requests + 1)],
        "row_request_N": [r for r, _ in rows] + padding,
        "row_position_N": [k for _, k in rows] + padding,
    }


def tensors(case: Case) -> AdmissionInputs:
    return AdmissionInputs(*(torch.from_numpy(case[name]) for name in AdmissionInputs._fields))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What the Triton kernel gives for every case, from one process with Triton's interpreter."""
    folder = tmp_path_factory.mktemp("admission")
    cases = {f"{i}.{name}": case[name] for i, case in enumerate(CASES.values()) for name in AdmissionInputs._fields}
    np.savez(folder / "cases.npz", allow_pickle=False, **cases)
    subprocess.run(
        [sys.executable, "-m", "tests.interpreted_admission", folder / "cases.npz", folder / "results.npz"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )
    return dict(np.load(folder / "results.npz"))


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_the_kernel_agrees_with_brute_force(number: int, interpreted: dict[str, np.ndarray]) -> None:
    expected = brute_force(list(CASES.values())[number])
    assert {name: interpreted[f"{number}.{name}"].tolist() for name in OUTPUTS} == expected


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_reference_agrees_with_brute_force(case: Case) -> None:
    requests, gamma = case["confidence_RG"].shape
    buffers = AdmissionBuffers(requests, gamma, "cpu")
    admit_and_pack(tensors(case), buffers)
    assert {name: getattr(buffers, name).tolist() for name in OUTPUTS} == brute_force(case)


@pytest.mark.parametrize("seed", range(40))
def test_host_and_device_decide_alike(seed: int) -> None:
    case = random_case(seed)
    case["factor_BG"][:], case["addend_BG"][:] = 1.0, 0.0
    case["live"] = np.array(len(case["weight_R"]), dtype=np.int32)
    buffers = AdmissionBuffers(case["confidence_RG"].shape[0], case["confidence_RG"].shape[1], "cpu")
    admit_and_pack(tensors(case), buffers)
    confidence_RG, _ = sanitise(case["confidence_RG"])
    host_R = admit(values(confidence_RG, case["weight_R"]), float(case["price"]), int(case["capacity"]))
    assert buffers.verify_lens_R.tolist() == host_R.tolist()


def test_nothing_of_an_earlier_round_is_left_and_no_output_moves() -> None:
    wide, narrow = make_case(np.ones((4, 3))), make_case(np.ones((4, 3)), capacity=1, live=2)
    buffers = AdmissionBuffers(4, 3, "cpu")
    addresses = [getattr(buffers, name).data_ptr() for name in OUTPUTS]
    for case in (wide, narrow):
        admit_and_pack(tensors(case), buffers)
        assert {name: getattr(buffers, name).tolist() for name in OUTPUTS} == brute_force(case)
        assert [getattr(buffers, name).data_ptr() for name in OUTPUTS] == addresses


Implementation = Callable[[AdmissionInputs, AdmissionBuffers], object]


def on_a_fake_gpu(implementation: Implementation) -> None:
    case = CASES["random 0"]
    requests, gamma = case["confidence_RG"].shape
    kinds = [(tensor.shape, tensor.dtype) for tensor in tensors(case)]
    with FakeTensorMode():
        inputs = AdmissionInputs(*(torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in kinds))
        implementation(inputs, AdmissionBuffers(requests, gamma, "cuda"))


def test_the_reference_can_be_captured() -> None:
    on_a_fake_gpu(admit_and_pack_torch)


@pytest.mark.parametrize(
    "breach",
    [
        lambda inputs, buffers: inputs.price.item(),
        lambda inputs, buffers: bool(inputs.price > 0),
        lambda inputs, buffers: inputs.confidence_RG.masked_select(inputs.confidence_RG > 0.5),
    ],
)
def test_a_fake_gpu_catches_what_cannot_be_captured(
    breach: Callable[[AdmissionInputs, AdmissionBuffers], object],
) -> None:
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        on_a_fake_gpu(breach)


def test_no_implementation_waits_for_the_device() -> None:
    waiting = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "unique", "masked_select", "is_nonzero"}
    for function in (admission.admit_and_pack, admission.admit_and_pack_torch, admission.admit_and_pack_triton):
        called = {
            node.attr for node in ast.walk(ast.parse(inspect.getsource(function))) if isinstance(node, ast.Attribute)
        }
        assert not called & waiting


def test_inputs_of_another_shape_than_the_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"confidence_RG must be \(4, 3\)"):
        admit_and_pack(tensors(make_case(np.ones((4, 2)))), AdmissionBuffers(4, 3, "cpu"))
    with pytest.raises(ValueError, match="max_requests and gamma"):
        AdmissionBuffers(0, 3, "cpu")
