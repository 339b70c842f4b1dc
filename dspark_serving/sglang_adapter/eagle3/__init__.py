"""Eagle3 as a chain drafter inside SGLang's DSpark worker: another draft pass and another commit; the rest stays."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.speculative.dspark_components.dspark_config import DSparkRuntimeConfig

from dspark_serving.drafters import DrafterSpec
from dspark_serving.sglang_adapter.eagle3.context import ChainContext
from dspark_serving.sglang_adapter.eagle3.proposer import ChainProposer


def runtime_config(*, draft_hf_config: Any, **unused: Any) -> DSparkRuntimeConfig:
    """Stands in for SGLang's reading of a DSpark drafter's config, which insists on a Markov head and a mask token."""
    gamma = int(draft_hf_config.block_size)
    filler = 0  # behind the anchor of a round without drafts; any token will do there
    return DSparkRuntimeConfig(gamma=gamma, verify_num_draft_tokens=gamma + 1, mask_token_id=filler)


PARTS: dict[str, Any] = {
    "DraftBlockProposer": ChainProposer,
    "TargetHiddenKvInjector": ChainContext,
    "resolve_runtime_config": runtime_config,
}
"""What the constructor of SGLang's worker takes from names of its module."""


def prepare_worker(worker: Any, spec: DrafterSpec, *, late: bool) -> ChainContext:
    """Connect the parts of a constructed worker; `late` keeps rows until somebody reads them (cpu/commit.py)."""
    context, proposer = worker._kv_injector, worker._proposer
    context.late = late
    worker._verify_executor.commit_hidden = context.commit_hidden
    worker._decode_graph_allowed = False  # from here on: no capture of a block forward that the drafter does not have
    proposer.context = context
    proposer.vocab_size = spec.vocab_size
    proposer.token_ids, proposer.cuts_logits = None, False
    if spec.draft_token_ids is not None:
        proposer.token_ids = torch.tensor(spec.draft_token_ids, device=worker.device)
        proposer.cuts_logits = not spec.own_head and not worker.draft_model.cut_head(proposer.token_ids)
    return context
