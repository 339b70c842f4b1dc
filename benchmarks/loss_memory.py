"""Memory and time of the vocabulary-sized loss, plain and in chunks: `python -m benchmarks.loss_memory`.

Values and gradients of cross-entropy and L1 for N draft rows, five to a target position, in fp32 on one CPU thread.
Every point runs in a process of its own; its bytes are the growth of that process's peak over the inputs.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from dspark_kernels.vocabulary_loss import DraftRows, RowWeights, TargetRows, vocabulary_loss
from torch import Tensor

from dspark_serving.bench.results import ResultFile, Row
from dspark_serving.cli.console import one_line_errors, report

_RESULT = Path(__file__).parent / "results" / "loss_memory.json"
_ROWS, _VOCABULARIES = (1024, 4096), (6144, 49152)
_HIDDEN, _RANK, _BLOCK = 576, 64, 5


def plain(draft: DraftRows, target: TargetRows, labels_N: Tensor) -> Tensor:
    """The formula over whole tensors, its gradient by autograd."""
    logits_NV = draft.hidden_ND @ draft.head_VD.T + draft.latent_NR @ draft.w2_VR.T  # type: ignore[operator, union-attr]
    target_PV = (target.hidden_PE @ target.head_VE.T - target.normaliser_P[:, None]).exp_()
    probs_NV = target_PV[target.position_N]
    log_probs_NV = logits_NV.log_softmax(-1)
    return F.nll_loss(log_probs_NV, labels_N) + (log_probs_NV.exp() - probs_NV).abs().sum(-1).mean()


def chunked(draft: DraftRows, target: TargetRows, labels_N: Tensor) -> Tensor:
    """The same by the kernel package."""
    weights_N = torch.full(labels_N.shape, 1 / len(labels_N))
    return vocabulary_loss(draft, target, labels_N, RowWeights(ce_N=weights_N, l1_N=weights_N))[0]


def measure(arm: str, rows: int, vocabulary: int) -> Row:
    """One forward and backward in this process, which has to be a new one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head_VD, hidden_PE = torch.randn(vocabulary, _HIDDEN).div_(8), torch.randn(-(-rows // _BLOCK), _HIDDEN)
    # About what logits of this spread sum to: computing it would leave memory behind that the loss could use again.
    normaliser_P = torch.full((len(hidden_PE),), math.log(vocabulary) + _HIDDEN / 64 / 2)
    leaves = [torch.randn(rows, _HIDDEN), torch.randn(rows, _RANK), torch.randn(vocabulary, _RANK).div_(8)]
    hidden_ND, latent_NR, w2_VR = (leaf.requires_grad_() for leaf in leaves)
    target = TargetRows(hidden_PE, head_VD, normaliser_P, torch.arange(rows) // _BLOCK)
    labels_N = torch.randint(0, vocabulary, (rows,))
    before, start = _resident_bytes(), time.process_time()
    loss = {"plain": plain, "chunked": chunked}[arm](DraftRows(hidden_ND, head_VD, latent_NR, w2_VR), target, labels_N)
    loss.backward()
    return {
        "arm": arm,
        "rows": rows,
        "vocabulary": vocabulary,
        "peak_bytes": _peak_bytes() - before,
        "seconds": round(time.process_time() - start, 3),
        "loss": round(loss.item(), 5),
    }


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(output: Annotated[Path, typer.Option(help="JSON file; a table is written beside it.")] = _RESULT) -> None:
    """Measure every point."""
    with one_line_errors():
        result, found = ResultFile("loss_memory", output), []
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            points = [(arm, n, v) for v in _VOCABULARIES for n in _ROWS for arm in ("plain", "chunked")]
            for row in pool.map(measure, *zip(*points, strict=True)):
                found.append(row)
                report(f"{row['arm']} {row['rows']} x {row['vocabulary']}: {row['peak_bytes'] / 1e6:.0f} MB")
        notes = (
            f"Cross-entropy and L1, forward and backward, fp32, one thread, hidden size {_HIDDEN}, rank {_RANK}, "
            f"{_BLOCK} rows a target position. Peak: growth of the process's largest resident size over the inputs. "
            "Seconds: processor time of one pass, not repeated, on a machine that did other work too."
        )
        result.write(found, notes)
        lines = ["| rows x vocabulary | arm | peak, MB | seconds |", "|---|---|---|---|"]
        lines += [
            f"| {row['rows']} x {row['vocabulary']} | {row['arm']} | {row['peak_bytes'] / 1e6:.0f} | {row['seconds']} |"
            for row in found
        ]
        output.with_suffix(".md").write_text(
            f"# Memory of the vocabulary-sized loss\n\n{notes}\n\n" + "\n".join(lines) + "\n"
        )
        report(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
