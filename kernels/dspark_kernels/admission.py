"""Which drafted tokens are verified, decided and packed on the device: calibrate, rank, cut, lay out.

Both implementations have static shapes, read whatever changes from device memory and write into buffers that are
allocated once, so that a captured CUDA graph can contain them. Decision rule: DSpark paper, section 5.2, with a price
below which a position is not verified. R = max_requests, G = gamma, B temperature bands, N = R * (G + 1).
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class AdmissionInputs(NamedTuple):
    """Everything that decides, on one device and contiguous."""

    confidence_RG: torch.Tensor  # float32: of surviving, given the prefix
    factor_BG: torch.Tensor  # float32 > 0: of the calibration, on logits
    addend_BG: torch.Tensor  # float32: of the calibration, to logits
    band_R: torch.Tensor  # int32: row of the calibration
    weight_R: torch.Tensor  # float32 > 0, finite: value of a token
    price: torch.Tensor  # float32 scalar: least value of a verified position
    capacity: torch.Tensor  # int32 scalar: drafted tokens over the batch
    live: torch.Tensor  # int32 scalar: requests from this one on are padding


class AdmissionBuffers:
    """The outputs, allocated once; their addresses never change.

    A position is 0 for the anchor and k for the k-th drafted token. Rows behind the last packed one hold -1.
    """

    def __init__(self, max_requests: int, gamma: int, device: torch.device | str) -> None:
        if max_requests < 1 or gamma < 1:
            raise ValueError(f"max_requests and gamma must be at least 1, got {max_requests} and {gamma}")

        def zeros(length: int) -> torch.Tensor:
            return torch.zeros(length, dtype=torch.int32, device=device)

        self.max_requests, self.gamma = max_requests, gamma
        self.verify_lens_R = zeros(max_requests)  # anchor included; 0 for padding
        self.row_starts = zeros(max_requests + 1)  # exclusive cumulative sum of verify_lens_R; the last is the total
        self.row_request_N = zeros(max_requests * (gamma + 1))
        self.row_position_N = zeros(max_requests * (gamma + 1))


def admit_and_pack(inputs: AdmissionInputs, buffers: AdmissionBuffers) -> None:
    """Choose the drafted tokens to verify and write the packed layout into `buffers`.

    Position k of request r has the value weight_r * a_rk, with a_rk = prod_{i<=k} sigmoid(f_i logit(c_ri) + g_i) and
    f, g the factor and addend of the request's band. A confidence that is no probability counts as 1. Positions of a
    value of at least `price` are admitted; of more than `capacity` such positions, the best, ties going to the earlier
    position, then to the earlier request.

    Raises ValueError when inputs and buffers are of different sizes.
    """
    expected = (buffers.max_requests, buffers.gamma)
    found = tuple(inputs.confidence_RG.shape)
    if found != expected:
        raise ValueError(f"confidence_RG must be {expected} as the buffers are, got {found}")
    implementation = admit_and_pack_triton if inputs.confidence_RG.is_cuda else admit_and_pack_torch
    implementation(inputs, buffers)


def admit_and_pack_torch(inputs: AdmissionInputs, buffers: AdmissionBuffers) -> None:
    """The reference: see `admit_and_pack`."""
    confidence_RG, factor_BG, addend_BG, band_R, weight_R, price, capacity, live = inputs
    requests, gamma = confidence_RG.shape
    device = confidence_RG.device
    proper_RG = (confidence_RG >= 0) & (confidence_RG <= 1)
    factor_RG, addend_RG = factor_BG.index_select(0, band_R), addend_BG.index_select(0, band_R)
    corrected_RG = torch.sigmoid(torch.logit(confidence_RG) * factor_RG + addend_RG)
    calibrated_RG = torch.where((factor_RG == 1) & (addend_RG == 0), confidence_RG, corrected_RG)
    calibrated_RG = torch.where(proper_RG, calibrated_RG, 1.0)
    # One product after the other: the precision of cumprod differs between devices.
    values = list(accumulate(calibrated_RG.unbind(dim=1), torch.mul, initial=weight_R))
    real_R = torch.arange(requests, device=device) < live
    value_GR = torch.where(real_R, torch.stack(values[1:]), -1.0)

    order = torch.sort(value_GR.flatten(), descending=True, stable=True).indices
    rank_GR = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=device)).view(gamma, -1)
    admitted_GR = real_R & (value_GR >= price) & (rank_GR < capacity)
    ends_R = buffers.row_starts.narrow(0, 1, requests)
    torch.mul(1 + admitted_GR.sum(dim=0, dtype=torch.int32), real_R, out=buffers.verify_lens_R)
    torch.cumsum(buffers.verify_lens_R, dim=0, dtype=torch.int32, out=ends_R)

    row_N = torch.arange(buffers.row_request_N.numel(), dtype=torch.int32, device=device)
    request_N = torch.searchsorted(ends_R, row_N, right=True, out_int32=True)
    position_N = row_N - buffers.row_starts.gather(0, request_N.long())
    packed_N, nothing_N = row_N < buffers.row_starts.narrow(0, requests, 1), torch.full_like(row_N, -1)
    torch.where(packed_N, request_N, nothing_N, out=buffers.row_request_N)
    torch.where(packed_N, position_N, nothing_N, out=buffers.row_position_N)


def admit_and_pack_triton(inputs: AdmissionInputs, buffers: AdmissionBuffers) -> None:
    """One program for the whole batch: see `admit_and_pack`."""
    requests, gamma = buffers.max_requests, buffers.gamma
    rows = buffers.row_request_N.numel()
    _admit_and_pack_kernel[(1,)](
        *inputs,
        buffers.verify_lens_R,
        buffers.row_starts,
        buffers.row_request_N,
        buffers.row_position_N,
        R=requests,
        G=gamma,
        N=rows,
        BLOCK_R=triton.next_power_of_2(requests),
        BLOCK_P=triton.next_power_of_2(gamma + 1),
        BLOCK_N=triton.next_power_of_2(rows),
        num_warps=8,
    )


@triton.jit
def _admit_and_pack_kernel(  # type: ignore[no-untyped-def]
    confidence_ptr,
    factor_ptr,
    addend_ptr,
    band_ptr,
    weight_ptr,
    price_ptr,
    capacity_ptr,
    live_ptr,
    verify_lens_ptr,
    row_starts_ptr,
    row_request_ptr,
    row_position_ptr,
    R: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The tile is [BLOCK_P, BLOCK_R]: its row-major order is the order in which ties are broken.
    request = tl.arange(0, BLOCK_R)
    position = tl.arange(0, BLOCK_P)
    price = tl.load(price_ptr)
    capacity = tl.maximum(tl.load(capacity_ptr), 0)
    real = request < tl.minimum(tl.load(live_ptr), R)
    weight = tl.load(weight_ptr + request, mask=real, other=0.0)
    band = tl.load(band_ptr + request, mask=real, other=0)

    running = weight
    value = tl.full([BLOCK_P, BLOCK_R], -1.0, tl.float32)
    for k in tl.static_range(G):
        confidence = tl.load(confidence_ptr + request * G + k, mask=real, other=1.0)
        factor = tl.load(factor_ptr + band * G + k)
        addend = tl.load(addend_ptr + band * G + k)
        proper = (confidence >= 0.0) & (confidence <= 1.0)
        logit = tl.log(confidence / (1.0 - confidence))
        corrected = 1.0 / (1.0 + tl.exp(-(logit * factor + addend)))
        calibrated = tl.where((factor == 1.0) & (addend == 0.0), confidence, corrected)
        running = running * tl.where(proper, calibrated, 1.0)
        value = tl.where((position[:, None] == k) & real[None, :], running[None, :], value)

    # Floats from 0 on compare as their bits do: the capacity-th largest value is found bit by bit.
    eligible = (value >= price) & (value >= 0.0)
    bits = tl.where(value > 0.0, value, 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(eligible, bits, -1)
    low = tl.full([], 0, tl.int32)  # count(bits >= low) > capacity, unless all fit
    high = tl.max(tl.max(bits, axis=1), axis=0) + 1  # count(bits >= high) <= capacity
    if tl.sum(tl.sum(eligible.to(tl.int32), axis=1), axis=0) <= capacity:
        high = low
    while high - low > 1:
        middle = low + (high - low) // 2
        if tl.sum(tl.sum((bits >= middle).to(tl.int32), axis=1), axis=0) > capacity:
            low = middle
        else:
            high = middle

    above = bits >= high
    tied = ((bits == low) & (low < high)).to(tl.int32)
    tied_in_row = tl.sum(tied, axis=1)
    tied_before = tl.cumsum(tied, axis=1) - tied + (tl.cumsum(tied_in_row, axis=0) - tied_in_row)[:, None]
    room = capacity - tl.sum(tl.sum(above.to(tl.int32), axis=1), axis=0)
    admitted = above | ((tied > 0) & (tied_before < room))

    verify_lens = tl.where(real, 1 + tl.sum(admitted.to(tl.int32), axis=0), 0)
    ends = tl.cumsum(verify_lens, axis=0)
    starts = ends - verify_lens
    total = tl.sum(verify_lens, axis=0)
    tl.store(verify_lens_ptr + request, verify_lens, mask=request < R)
    tl.store(row_starts_ptr + request, starts, mask=request < R)
    tl.store(row_starts_ptr + R, total)

    packed = position[:, None] < verify_lens[None, :]
    row = starts[None, :] + position[:, None]
    tl.store(row_request_ptr + row, request[None, :] + tl.zeros_like(row), mask=packed)
    tl.store(row_position_ptr + row, position[:, None] + tl.zeros_like(row), mask=packed)
    padding = tl.arange(0, BLOCK_N)
    nothing = tl.full([BLOCK_N], -1, tl.int32)
    tl.store(row_request_ptr + padding, nothing, mask=(padding >= total) & (padding < N))
    tl.store(row_position_ptr + padding, nothing, mask=(padding >= total) & (padding < N))
