"""Admission where the confidences are, on the accelerator, and its traces on the host, without waiting for either."""

from __future__ import annotations

import numpy as np
import torch
from dspark_kernels.admission import AdmissionBuffers, AdmissionInputs, admit_and_pack

from dspark_serving.scheduler.recalibration import BANDS, bands
from dspark_serving.scheduler.round import Batch, Plan, Terms


class HostCopy:
    """A small tensor on its way to the host. `numpy` waits for it, which costs nothing once its round is finished."""

    def __init__(self, source: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._copy = source
        if source.is_cuda:
            self._copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._copy.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def numpy(self) -> np.ndarray:
        """The values as they were when the copy was ordered."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.numpy()


class DeviceAdmission:
    """Fixed buffers for the admission kernel: what it reads is written in place before each launch.

    Args:
        requests: most requests of a batch.
        gamma: drafted tokens a block.
    """

    def __init__(self, requests: int, gamma: int, device: torch.device | str) -> None:
        factor_BG, addend_BG = torch.zeros(2, len(BANDS), gamma, device=device)
        self._buffers = AdmissionBuffers(requests, gamma, device)
        self._inputs = AdmissionInputs(
            torch.ones(requests, gamma, dtype=torch.float32, device=device),
            factor_BG,
            addend_BG,
            torch.zeros(requests, dtype=torch.int32, device=device),
            torch.ones(requests, dtype=torch.float32, device=device),
            torch.zeros((), dtype=torch.float32, device=device),
            torch.zeros((), dtype=torch.int32, device=device),
            torch.zeros((), dtype=torch.int32, device=device),
        )

    def __call__(self, confidence_RG: torch.Tensor, plan: Plan, batch: Batch, terms: Terms) -> torch.Tensor:
        """Verify lengths [R] int32 on the device; valid until the next call."""
        requests = len(confidence_RG)
        confidence, factor_BG, addend_BG, band, weight, price, capacity, live = self._inputs
        confidence[:requests].copy_(confidence_RG)
        bands_R = bands(batch.temperature_R).astype(np.int32)
        for source, goal in zip(
            (*terms.line_2BG, bands_R, terms.weight_R),
            (factor_BG, addend_BG, band[:requests], weight[:requests]),
            strict=True,
        ):
            goal.copy_(torch.from_numpy(source), non_blocking=True)
        price.fill_(plan.price)
        capacity.fill_(min(plan.capacity, confidence.numel()))
        live.fill_(requests)
        admit_and_pack(self._inputs, self._buffers)
        return self._buffers.verify_lens_R[:requests]
