"""Models and drafters on this machine: targets made in the cache, and the drafters that the project ships."""

from __future__ import annotations

from dspark_serving.assets.bundles import shipped_bundle
from dspark_serving.assets.smollm2 import Dtype, ensure_smollm2, verify_smollm2

__all__ = ["Dtype", "ensure_smollm2", "shipped_bundle", "verify_smollm2"]
