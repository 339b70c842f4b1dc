"""Reads published drafters into one description and refuses what cannot be served."""

from __future__ import annotations

from dspark_serving.drafters.fit import check_fit
from dspark_serving.drafters.registry import canonical_names, read_spec
from dspark_serving.drafters.spec import DrafterSpec
from dspark_serving.drafters.view import make_view
from dspark_serving.drafters.weights import check_target_files, check_weights

__all__ = [
    "DrafterSpec",
    "canonical_names",
    "check_fit",
    "check_target_files",
    "check_weights",
    "make_view",
    "read_spec",
]
