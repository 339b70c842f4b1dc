"""Where the drafters that come with this project are."""

from __future__ import annotations

import sys
from pathlib import Path

from dspark_serving.errors import CheckpointError

_PLACES = (
    Path(__file__).resolve().parents[2] / "examples" / "bundles",  # a clone of the repository
    Path(sys.prefix) / "share" / "dspark-serving" / "bundles",  # an installed wheel
)


def shipped_bundle(name: str = "smollm2-135m-dspark") -> Path:
    """Return the directory of a drafter that comes with this project.

    Raises:
        CheckpointError: the installation does not have it.
    """
    for place in _PLACES:
        if (place / name / "config.json").is_file():
            return place / name
    raise CheckpointError(
        f"the drafter {name} is not in this installation",
        expected=f"it in one of {', '.join(str(place) for place in _PLACES)}",
        fix="Install from a clone of the repository, or name a bundle of your own.",
    )
