"""`python -m dspark_serving.bench.pace_process`: does the same piece of work five times a second.

The work is a small model's: bfloat16 products with more weights than fit into the caches. Prints a line each time: when
(monotonic clock) and how many seconds of CPU time it took. Waiting for the core does not count, only how fast it was.
"""

from __future__ import annotations

import sys
import time

import torch

_EVERY = 0.2
_PRODUCTS = 6  # some 2 ms, 1 % of a core
_WEIGHTS, _WIDTH, _ROWS = 60, (1536, 576), 8


def main() -> None:
    """Work until the process is ended."""
    torch.set_num_threads(1)
    x = torch.randn(_ROWS, _WIDTH[1], dtype=torch.bfloat16)
    weights = [torch.randn(_WIDTH, dtype=torch.bfloat16) for _ in range(_WEIGHTS)]
    turn = 0
    while True:
        time.sleep(_EVERY)
        start = time.thread_time()
        for _ in range(_PRODUCTS):
            x @ weights[turn % _WEIGHTS].T
            turn += 1
        sys.stdout.write(f"{time.monotonic()} {time.thread_time() - start}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
