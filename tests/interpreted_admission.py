"""Runs the Triton kernel on saved cases. A process of its own: Triton decides at its import whether it interprets."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from dspark_kernels.admission import AdmissionBuffers, AdmissionInputs, admit_and_pack_triton

OUTPUTS = ("verify_lens_R", "row_starts", "row_request_N", "row_position_N")


def main(cases_file: Path, results_file: Path) -> None:
    cases = np.load(cases_file)
    results: dict[str, np.ndarray] = {}
    for case in range(len(cases.files) // len(AdmissionInputs._fields)):
        inputs = AdmissionInputs(*(torch.from_numpy(cases[f"{case}.{name}"]) for name in AdmissionInputs._fields))
        buffers = AdmissionBuffers(inputs.confidence_RG.shape[0], inputs.confidence_RG.shape[1], "cpu")
        admit_and_pack_triton(inputs, buffers)
        results |= {f"{case}.{name}": getattr(buffers, name).numpy() for name in OUTPUTS}
    np.savez(results_file, allow_pickle=False, **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
