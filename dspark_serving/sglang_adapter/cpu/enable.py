"""Switches the CPU parts on: the attention backend in every process, the drafter's in the worker."""

from __future__ import annotations

from typing import Any

import torch

from dspark_serving.drafters import DrafterSpec
from dspark_serving.sglang_adapter.cpu.commit import LateCommit


def register_backend() -> None:
    """Put our attention backend under the name torch_native, and allow it for drafters; in every process."""
    from sglang.srt.arg_groups.choices import DRAFT_ATTENTION_BACKEND_CHOICES, add_draft_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    def create(runner: Any) -> Any:
        from dspark_serving.sglang_adapter.cpu.attention import BatchedTorchNativeBackend

        return BatchedTorchNativeBackend(runner)

    register_attention_backend("torch_native")(create)
    if "torch_native" not in DRAFT_ATTENTION_BACKEND_CHOICES:
        add_draft_attention_backend_choices(["torch_native"])


def prepare_worker(worker: Any, spec: DrafterSpec) -> LateCommit:
    """Give the worker its draft chain and a late commit, and keep its draft layers off CUDA-only kernels."""
    from dspark_serving.sglang_adapter.cpu.drafting import DraftChain
    from dspark_serving.sglang_adapter.models.block import NoMarkov

    for layer in worker.draft_model.layers:
        layer.self_attn.use_table_qk_norm_rope = False
    head = worker.draft_model.lm_head
    token_ids = None if spec.draft_token_ids is None else torch.tensor(spec.draft_token_ids)
    rows = len(token_ids) if token_ids is not None and spec.own_head else spec.vocab_size  # SGLang pads the head
    markov_head = worker.draft_model.markov_head
    worker._proposer.chain = DraftChain(
        head.weight.data[:rows],
        None if isinstance(markov_head, NoMarkov) else markov_head,
        spec.vocab_size,
        token_ids,
        judged=worker._proposer.survival_map is not None,
        soft_cap=worker.draft_model.soft_cap,
    )
    late = LateCommit(worker._kv_injector, worker.verify_num_draft_tokens)
    worker._verify_executor.commit_hidden = late.commit_hidden
    return late


class _HostTensor(torch.Tensor):
    """A tensor on the host, where there are no streams to record."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def record_stream(self, stream: object) -> None:
        """Nothing to do: the host runs in order."""


def without_stream(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor with a `record_stream` that does nothing; results of operations on it are plain tensors."""
    return tensor.as_subclass(_HostTensor)
