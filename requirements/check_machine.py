"""Refuses a machine on which `make install` cannot succeed.

Standard library only: it runs before the environment exists.
"""

from __future__ import annotations

import shutil
import sys

PYTHONS = ((3, 11), (3, 12))
FREE_GB = 6.0  # the environment takes 3 GB, pip's downloads 1 GB, the target checkpoints 1 GB


def problem() -> str | None:
    """What keeps this machine from being used and what to do about it, or None."""
    if sys.version_info[:2] not in PYTHONS:
        found = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"Python {found} found; expected 3.11 or 3.12. Name one: make install PYTHON=/path/to/python3.11"
    free_gb = shutil.disk_usage(".").free / 1e9
    if free_gb < FREE_GB:
        return f"{free_gb:.1f} GB of disk free here; expected {FREE_GB:.0f} GB. Free some, or clone to a larger disk."
    return None


if __name__ == "__main__":
    sys.exit(problem())
