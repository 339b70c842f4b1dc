"""The round on SGLang: its native DSpark worker with our planner and proposer, on CUDA and on CPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.runtime_context import get_parallel, get_schedule
from sglang.srt.speculative.dspark_components import dspark_worker_v2
from sglang.srt.speculative.dspark_components.dspark_worker_v2 import DSparkWorkerV2

from dspark_serving import __version__
from dspark_serving.drafters import read_spec
from dspark_serving.metrics import RoundStats, ServerMetrics
from dspark_serving.scheduler.baselines import FullPolicy
from dspark_serving.scheduler.round import Policy
from dspark_serving.sglang_adapter import eagle3, resolution
from dspark_serving.sglang_adapter.cpu import plain
from dspark_serving.sglang_adapter.device import DeviceAdmission
from dspark_serving.sglang_adapter.plan_sync import PlanSync
from dspark_serving.sglang_adapter.planner import PolicyPlanner
from dspark_serving.sglang_adapter.proposer import PolicyProposer
from dspark_serving.sglang_adapter.rounds import RoundLog
from dspark_serving.sglang_adapter.verification import SamplingVerifier

if TYPE_CHECKING:
    from dspark_serving.recording import FlightRecorder
    from dspark_serving.sglang_adapter.scheduling import Repertoire

logger = logging.getLogger(__name__)


class DsparkServingWorker(DSparkWorkerV2):
    """SGLang's worker, with the verify lengths decided by a policy and every phase of a round timed.

    It verifies fully until scheduling.py has measured the engine and calls `start_scheduling`.
    """

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any, **kwargs: Any) -> None:
        self._on_cpu = torch.device(target_worker.device).type == "cpu"
        self.stats = RoundStats()
        self._rounds = RoundLog()
        self._late_commit: Any = None
        self.repertoire: Repertoire | None = None
        self.recorder: FlightRecorder | None = None
        counts = server_args.enable_metrics and get_parallel().attn_tp_rank == 0  # Prometheus adds up processes
        self._metrics = ServerMetrics(__version__) if counts else None
        spec = read_spec(resolution.local_directory(server_args.speculative_draft_model_path, "drafter"))
        with _our_parts(spec.family, on_cpu=self._on_cpu):
            super().__init__(server_args, gpu_id, nccl_port, target_worker, **kwargs)
        if not self._hosts_draft:
            return
        parallel = get_parallel()
        ranks = parallel.tp_group
        self._verify_planner.plan_sync = PlanSync(ranks.cpu_group if parallel.tp_size > 1 else None, ranks.first_rank)
        if self._verify_planner.schedules_verify_budget:
            self._proposer.survival_map = resolution.survival_map_of(spec)
            judge = "its confidence head" if self._proposer.survival_map is None else "their own distributions"
            logger.info("drafts of %s are judged by %s", spec.path, judge)
        if spec.family == "eagle3":
            self._late_commit = eagle3.prepare_worker(self, spec, late=self._on_cpu)
        elif self._on_cpu:
            from dspark_serving.sglang_adapter.cpu import enable

            self._late_commit = enable.prepare_worker(self, spec)
        elif spec.draft_token_ids is not None:
            self.draft_model.propose_only(torch.tensor(spec.draft_token_ids))
        self.family = spec.family
        self.use(FullPolicy())
        self._time_phases()

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._verify_planner.policy

    def use(self, policy: Policy) -> None:
        """Switch to `policy` from the next round on; the drafter's context stays current under every policy."""
        if self.recorder is not None and self.repertoire is not None:
            policy = self.recorder.watch(policy, self.repertoire.parts)
        self._verify_planner.policy = policy
        if self._metrics is not None:
            self._metrics.set_policy(policy.name)

    def start_scheduling(self, repertoire: Repertoire, recorder: FlightRecorder | None) -> None:
        """From now on policies come from `repertoire`, and their rounds go to `recorder`."""
        self.repertoire = repertoire
        self.recorder = recorder
        if not self._on_cpu:
            requests = get_schedule().max_running_requests
            self._verify_planner.device_admission = DeviceAdmission(requests, self.gamma, self.device)

    @property
    def carries_confidence(self) -> bool:
        """Whether drafts come with confidences; without that there is nothing to schedule by."""
        return self._hosts_draft and bool(self._verify_planner.carries_confidence) and self._proposer.judges

    def _time_phases(self) -> None:
        """Time the phases on the host: exact where rounds run eagerly, launch times only on a device with streams."""
        late = self._late_commit  # only its flush does work worth timing
        commit = (self._verify_executor, "commit_hidden", "commit") if late is None else (late, "flush", "commit")
        for owner, method, phase in (
            (self._proposer, "propose", "propose"),
            (self._verify_planner, "begin", "plan"),
            (self._verify_planner, "schedule_layout", "admit"),
            (self._verify_executor, "run_compact", "verify"),
            (self._verify_executor, "run_non_compact", "verify"),
            (self._verify_executor, "accept_and_finalize", "accept"),
            commit,
        ):
            setattr(owner, method, self.stats.timed(phase, getattr(owner, method)))

    def _forward_prefill(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self._rounds.interrupt()
        if self._late_commit is not None:
            self._late_commit.flush()
        if self._hosts_draft:
            self._verify_executor.penalties.begin(batch)
        return super()._forward_prefill(batch, *args, **kwargs)

    def _forward_decode(self, batch: Any, on_publish: Any, *args: Any, **kwargs: Any) -> Any:
        if batch.forward_mode.is_idle():
            return super()._forward_decode(batch, on_publish, *args, **kwargs)
        if self._on_cpu:
            from dspark_serving.sglang_adapter.cpu import enable

            batch.seq_lens = enable.without_stream(batch.seq_lens)
        started = time.perf_counter()
        planner = self._verify_planner
        with self.stats.round():
            plan = self._proposer.plan = planner.begin(batch)
            if self._late_commit is not None:
                self._late_commit.begin_round(batch, drafts=plan.drafts)
            if self._on_cpu and not plan.drafts and plain.is_plain(batch):
                result = plain.run(self, batch, on_publish, self._late_commit)
            else:
                result = super()._forward_decode(batch, on_publish, *args, **kwargs)
        self._rounds.launch(
            batch=planner.batch,
            plan=plan,
            confidence_RG=planner.confidence_RG,
            verify_lens_R=planner.verify_lens_R,
            draft_seconds=self.draft_seconds if plan.drafts else 0.0,
            started=started,
        )
        return result

    @property
    def draft_seconds(self) -> float:
        """Host seconds of the newest draft pass."""
        return self.stats.newest("propose")

    def agree(self, flag: bool) -> bool:
        """The deciding rank's `flag`, on every rank: times differ from rank to rank."""
        return self._verify_planner.plan_sync.agree(flag)

    def all_say(self, flag: bool) -> bool:
        """Whether `flag` is set on every rank."""
        return self._verify_planner.plan_sync.unanimous(flag)

    def any_rank_past(self, deadline: float) -> bool:
        """Whether the deciding rank's clock (time.monotonic) is past `deadline`: all ranks stop together."""
        return self.agree(time.monotonic() > deadline)

    def forget_rounds(self) -> None:
        """Drop rounds that were run to measure the engine."""
        self._rounds.forget()
        self.stats.clear()

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        """Learn from a round, after SGLang has copied its result to the host anyway."""
        super().on_verify_complete_cpu(num_correct_drafts_per_req, batch_size)
        outcome = self._rounds.complete(num_correct_drafts_per_req)
        if outcome is None:
            return
        self.stats.count(outcome, self.gamma, None if self.repertoire is None else self.repertoire.parts.cost.tiers)
        self.policy.observe(outcome)
        if self.repertoire is not None:
            self.repertoire.learn(self.policy.name, outcome)
        if self._metrics is not None:
            self._metrics.update(self.stats, outcome, {} if self.repertoire is None else self.repertoire.facts())

    def dspark_report(self) -> dict[str, Any]:
        """What /server_info shows under `internal_states[i].dspark`."""
        report: dict[str, Any] = {"active": True, "version": __version__, "family": self.family}
        report["policy"] = self.policy.name
        learned = {} if self.repertoire is None else {"scheduler": self.repertoire.facts()}
        return report | self.stats.snapshot() | learned


@contextmanager
def _our_parts(family: str, *, on_cpu: bool) -> Iterator[None]:
    """Let SGLang's constructor build our parts: it takes them from names of its module."""
    parts: dict[str, Any] = {
        "DSparkVerifyPlanner": PolicyPlanner,
        "DraftBlockProposer": PolicyProposer,
        "TargetVerifyExecutor": SamplingVerifier,
    }
    if family == "eagle3":
        parts |= eagle3.PARTS
    elif on_cpu:
        from dspark_serving.sglang_adapter.cpu.drafting import CpuProposer

        parts["DraftBlockProposer"] = CpuProposer
    native = {name: getattr(dspark_worker_v2, name) for name in parts}
    for name, part in parts.items():
        setattr(dspark_worker_v2, name, part)
    try:
        yield
    finally:
        for name, part in native.items():
            setattr(dspark_worker_v2, name, part)
