"""Runs the Triton kernel on saved cases. A process of its own: Triton decides at its import whether it interprets."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from dspark_kernels import row_terms
from safetensors.torch import load_file, save_file


def main(cases_file: Path, results_file: Path) -> None:
    row_terms._BLOCK_V = 16  # several tiles a row
    cases = load_file(cases_file)
    results: dict[str, torch.Tensor] = {}
    for case in sorted({name.split(".")[0] for name in cases}):
        chunk = row_terms.Chunk(*(cases[f"{case}.{name}"] for name in row_terms.Chunk._fields))
        untouched = chunk._replace(logits_CV=chunk.logits_CV.clone())
        values = row_terms.row_terms_triton(untouched, gradient=False)
        results[f"{case}.kept"] = untouched.logits_CV
        results |= {f"{case}.terms_3C": values[0], f"{case}.top_C": values[1]}
        again_3C, _ = row_terms.row_terms_triton(chunk, gradient=True)
        results |= {f"{case}.again_3C": again_3C, f"{case}.gradient_CV": chunk.logits_CV}
    save_file(results, results_file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
