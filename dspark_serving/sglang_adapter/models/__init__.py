"""Drafter networks on SGLang's layers, under the architectures that a view's config.json names."""

from __future__ import annotations


def register() -> None:
    """Make SGLang's loader find our drafters; in every process, because each loads plugins for itself."""
    from sglang.srt.models.registry import ModelRegistry

    from dspark_serving.sglang_adapter.models.block import DsparkServingBlockDrafter
    from dspark_serving.sglang_adapter.models.eagle3 import DsparkServingEagle3Drafter

    for drafter in (DsparkServingBlockDrafter, DsparkServingEagle3Drafter):
        ModelRegistry.models[drafter.__name__] = drafter
