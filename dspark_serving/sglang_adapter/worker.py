"""The round on SGLang: its native DSpark worker with our planner and proposer, on CUDA and on CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.speculative.dspark_components import dspark_worker_v2
from sglang.srt.speculative.dspark_components.dspark_worker_v2 import DSparkWorkerV2

from dspark_serving import __version__
from dspark_serving.drafters import read_spec
from dspark_serving.metrics import RoundStats, ServerMetrics
from dspark_serving.scheduler.policies import Policy, make_policy
from dspark_serving.sglang_adapter import options, resolution
from dspark_serving.sglang_adapter.planner import PolicyPlanner
from dspark_serving.sglang_adapter.proposer import PolicyProposer

logger = logging.getLogger(__name__)


class DsparkServingWorker(DSparkWorkerV2):
    """SGLang's worker, with the verify lengths decided by a policy and every phase of a round timed."""

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any, **kwargs: Any) -> None:
        self.policy = make_policy(options.config_of(server_args))
        self._on_cpu = torch.device(target_worker.device).type == "cpu"
        self.stats = RoundStats()
        self._metrics = ServerMetrics(__version__) if server_args.enable_metrics else None
        with _our_parts(self.policy, on_cpu=self._on_cpu):
            super().__init__(server_args, gpu_id, nccl_port, target_worker, **kwargs)
        if not self._hosts_draft:
            return
        spec = read_spec(resolution.local_directory(server_args.speculative_draft_model_path, "drafter"))
        if self._on_cpu:
            from dspark_serving.sglang_adapter.cpu import enable

            enable.prepare_worker(self, spec)
        elif spec.draft_token_ids is not None:
            logger.warning("%s: its reduced vocabulary is used on CPU only; drafting from all tokens here", spec.path)
        self.use(self.policy)
        self._time_phases()

    def use(self, policy: Policy) -> None:
        """Switch to `policy` from the next round on; the drafter's context stays current under every policy."""
        self.policy = policy
        self._verify_planner.use(policy)
        self._proposer.policy = policy
        if self._metrics is not None:
            self._metrics.set_policy(policy.name)

    def _time_phases(self) -> None:
        """Time the phases on the host: exact where rounds run eagerly, launch times only on a device with streams."""
        for owner, method, phase in (
            (self._proposer, "propose", "propose"),
            (self._verify_planner, "schedule_layout", "plan"),
            (self._verify_executor, "run_compact", "verify"),
            (self._verify_executor, "run_non_compact", "verify"),
            (self._verify_executor, "accept_and_finalize", "accept"),
            (self._verify_executor, "commit_hidden", "commit"),
        ):
            setattr(owner, method, self.stats.timed(phase, getattr(owner, method)))

    def _forward_decode(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self._on_cpu:
            from dspark_serving.sglang_adapter.cpu import enable

            batch.seq_lens = enable.without_stream(batch.seq_lens)
        with self.stats.round():
            result = super()._forward_decode(batch, *args, **kwargs)
        return result

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        """Count the accepted drafts of a round, after SGLang has copied them to the host anyway."""
        super().on_verify_complete_cpu(num_correct_drafts_per_req, batch_size)
        self.stats.count(num_correct_drafts_per_req)
        if self._metrics is not None:
            self._metrics.update(self.stats)

    def dspark_report(self) -> dict[str, Any]:
        """What /server_info shows under `internal_states[i].dspark`."""
        report: dict[str, Any] = {"active": True, "version": __version__, "policy": self.policy.name}
        return report | self.stats.snapshot()


@contextmanager
def _our_parts(policy: Policy, *, on_cpu: bool) -> Iterator[None]:
    """Let SGLang's constructor build our planner and proposer: it takes both from names of its module."""
    proposer: type[PolicyProposer] = PolicyProposer
    if on_cpu:
        from dspark_serving.sglang_adapter.cpu.drafting import CpuProposer

        proposer = CpuProposer
    parts = {"DSparkVerifyPlanner": PolicyPlanner.with_policy(policy), "DraftBlockProposer": proposer}
    native = {name: getattr(dspark_worker_v2, name) for name in parts}
    for name, part in parts.items():
        setattr(dspark_worker_v2, name, part)
    try:
        yield
    finally:
        for name, part in native.items():
            setattr(dspark_worker_v2, name, part)
