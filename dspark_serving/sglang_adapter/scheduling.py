"""Brings the scheduler to life in SGLang: profile or cached costs, calibration, the policy, and switching it later."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected, _UpdateHandler
from sglang.srt.runtime_context import get_parallel, get_schedule
from sglang.srt.speculative.dspark_components.dspark_planner import ragged_capture_num_tokens

from dspark_serving import __version__
from dspark_serving.assets.store import cache_root
from dspark_serving.config import POLICIES, PolicyName, ServingConfig, flag
from dspark_serving.errors import CheckpointError, DataError, OptionError
from dspark_serving.recording import FlightRecorder
from dspark_serving.scheduler.adaptive import AdaptivePolicy
from dspark_serving.scheduler.calibration import FILE_NAME, Calibration
from dspark_serving.scheduler.catalog import PolicyParts, make_policy
from dspark_serving.scheduler.cost import CostModel
from dspark_serving.scheduler.cost_table import COST_DIRECTORY, CostKey, checkpoint_identity, load_cost, save_cost
from dspark_serving.scheduler.recalibration import OnlineCalibration
from dspark_serving.scheduler.round import Outcome, Policy
from dspark_serving.sglang_adapter import options, resolution
from dspark_serving.sglang_adapter.profile import profile_engine, relative_error
from dspark_serving.sglang_adapter.routes import AS_STARTED, DUMP_KEY, POLICY_KEY, THRESHOLD_KEY

logger = logging.getLogger(__name__)

_TOLERATED_ERROR = 0.25
"""Median relative error of a table from the cache, beyond which the server measures again."""


class Repertoire:
    """The policies of a server. Each keeps what it learned while another one is in force."""

    def __init__(self, parts: PolicyParts, lag: int = 1, *, calibration_refused: bool = False) -> None:
        """Start with what was measured.

        Args:
            lag: rounds after which a round's outcome is known.
            calibration_refused: there was a calibration file that could not be used.
        """
        self.parts = parts
        self._lag = lag
        self._calibration_refused = calibration_refused
        self._newest: Outcome | None = None
        self._threshold = parts.threshold
        self.recalibration = OnlineCalibration(parts.calibration)
        self._made: dict[PolicyName, Policy] = {}

    def get(self, name: PolicyName) -> Policy:
        """One of the scheduler's own policies, or SGLang's.

        Raises:
            OptionError: SGLang's, and there are no step times to make its table of.
        """
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def set_threshold(self, threshold: float | None) -> None:
        """For policy threshold, the next time it is put in force; None: the one that the server was started with."""
        self.parts = self.parts._replace(threshold=self._threshold if threshold is None else threshold)
        self._made.pop("threshold", None)

    def learn(self, policy: str, outcome: Outcome) -> None:
        """What the rounds of every policy tell of the confidences; policy adaptive has learned that itself."""
        self._newest = outcome
        if policy != "adaptive" and outcome.plan.drafts and outcome.confidence_RG is not None:
            self.recalibration.observe(
                outcome.confidence_RG, outcome.verify_lens_R, outcome.accepted_R, outcome.batch.temperature_R
            )

    def facts(self) -> dict[str, float]:
        """What the scheduler has learned and counted, for metrics."""
        cost, recalibration = self.parts.cost, self.recalibration
        found = {
            "cost_known": float(cost.known),
            "cost_rounds_learned": float(cost.observed),
            "cost_rounds_rejected": float(cost.rejected),
            "calibration_drifts": float(recalibration.drifts),
            "calibration_drifting": float(recalibration.drifting),
            "calibration_refused": float(self._calibration_refused),
        }
        if self._newest is not None and cost.known:
            tokens = int(self._newest.verify_lens_R.sum())
            found["cost_uncertainty"] = cost.sureness(self._newest.batch.requests, tokens)
        for position, error in enumerate(recalibration.error_G.tolist(), start=1):
            if error == error:  # nan before the first label
                found[f"calibration_error_position_{position}"] = error
        policy = self._made.get("adaptive")
        if isinstance(policy, AdaptivePolicy):
            found["accepted_by_expected_greedy"] = policy.realism(sampled=False)
            found["accepted_by_expected_sampled"] = policy.realism(sampled=True)
            found |= {name: float(count) for name, count in vars(policy.incidents).items()}
        return found

    def _make(self, name: PolicyName) -> Policy:
        if name != "native":
            return make_policy(name, self.parts, self.recalibration)
        if not self.parts.cost.known:
            raise OptionError(
                "policy native without step times",
                expected=f"a server that measured its rounds at start-up ({flag('profile_seconds')} above 0)",
                fix="Start it with the profile, or choose another policy.",
            )
        from dspark_serving.sglang_adapter.native_budget import NativeBudgetPolicy

        return NativeBudgetPolicy(self.parts.gamma, self.parts.slots, self.parts.cost, lag=self._lag)


def start(scheduler: Any) -> None:
    """Measure the engine (or read what was measured before) and put the configured policy in force."""
    worker, server_args = scheduler.draft_worker, scheduler.server_args
    config = options.config_of(server_args)
    drafter = resolution.local_directory(server_args.speculative_draft_model_path, "drafter")
    if not worker.carries_confidence:
        logger.warning(
            "%s: no confidences for its drafts (static verification, or no confidence head and SGLang keeps no draft "
            "distributions): every drafted token is verified",
            drafter,
        )
        return
    calibration = _calibration(config, drafter, worker.gamma)
    parts = PolicyParts(
        gamma=worker.gamma,
        slots=int(scheduler.req_to_token_pool.req_generation.shape[0]),
        cost=_costs(scheduler, config, _cost_key(scheduler, drafter), drafter / COST_DIRECTORY),
        calibration=calibration or Calibration.identity(worker.gamma),
        threshold=config.threshold,
        speed_floor=config.speed_floor,
    )
    recorder = None if config.recording is None else FlightRecorder(config.recording)
    lag = 1 if get_schedule().disable_overlap_schedule else 2
    worker.start_scheduling(Repertoire(parts, lag, calibration_refused=calibration is None), recorder)
    worker.use(worker.repertoire.get(config.policy))


def update_handlers(worker: Any) -> dict[str, _UpdateHandler]:
    """What routes.py asks of the scheduler process, in SGLang's form."""

    def check_policy(key: str, value: Any) -> None:
        if value not in range(len(POLICIES)):
            raise UpdateRejected(f"{key} is {value}; expected a number below {len(POLICIES)}, of {POLICIES}.")
        if worker.repertoire is None:
            raise UpdateRejected("there are no confidences here, so nothing but full verification is possible.")
        try:
            worker.repertoire.get(POLICIES[value])
        except OptionError as error:
            raise UpdateRejected(str(error)) from error

    def set_policy(key: str, value: Any) -> None:
        worker.use(worker.repertoire.get(POLICIES[value]))
        logger.info("policy %s from now on", POLICIES[value])

    def check_threshold(key: str, value: Any) -> None:
        check_policy(key, 0)
        if not 0.0 <= value <= 1.0 and value != AS_STARTED:
            raise UpdateRejected(f"{key} is {value}; expected a number from 0 to 1.")

    def set_threshold(key: str, value: Any) -> None:
        worker.repertoire.set_threshold(None if value == AS_STARTED else float(value))

    def dump(key: str, value: Any) -> None:
        if worker.recorder is None:
            raise UpdateRejected(f"nothing is recorded; expected a server with {flag('recording')} DIRECTORY.")
        try:
            worker.recorder.dump()
        except OSError as error:
            raise UpdateRejected(f"nothing can be recorded now: {error}") from error

    return {
        POLICY_KEY: _UpdateHandler(check_policy, set_policy),
        THRESHOLD_KEY: _UpdateHandler(check_threshold, set_threshold),
        DUMP_KEY: _UpdateHandler(dump, lambda key, value: None),  # only the first step can still refuse
    }


def _costs(scheduler: Any, config: ServingConfig, key: CostKey, carried: Path | None = None) -> CostModel:
    """Costs of this engine: kept ones where they still hold, else measured now; without measuring, unknown.

    Args:
        carried: tables that came with the drafter; looked at where the cache has none that holds, never written to.
    """
    directory = cache_root() / COST_DIRECTORY
    deadline = time.monotonic() + config.profile_seconds
    for place in (directory,) if carried is None else (directory, carried):
        try:
            cost = load_cost(place, key)
        except DataError as error:
            logger.warning("%s Measuring again.", error)
            cost = None
        found = scheduler.draft_worker.all_say(cost is not None)  # ranks on another machine have another cache
        if cost is not None and found and (config.profile_seconds == 0 or _holds(scheduler, cost, deadline)):
            logger.info("step times from %s", place / key.file_name)
            return cost
    if config.profile_seconds == 0:
        return CostModel.unknown()
    logger.info("measuring rounds for at most %.0f s", config.profile_seconds)
    cost = CostModel.fit(profile_engine(scheduler, deadline), key.tiers)
    if get_parallel().tp_rank == 0:
        logger.info("step times kept in %s", save_cost(directory, key, cost))
    return cost


def _holds(scheduler: Any, cost: CostModel, deadline: float) -> bool:
    """Whether costs that were measured earlier, perhaps beside other tenants, predict this server's rounds."""
    error = relative_error(scheduler, cost, deadline)
    holds = scheduler.draft_worker.agree(error <= _TOLERATED_ERROR)
    if not holds:
        logger.info("step times measured earlier are off by %.0f %% now", 100 * error)
    return holds


def _cost_key(scheduler: Any, drafter: Path) -> CostKey:
    import sglang

    server_args, worker = scheduler.server_args, scheduler.draft_worker
    device = torch.device(worker.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}"
    tiers = ragged_capture_num_tokens(model_runner=worker.model_runner)
    return CostKey(
        device=name,
        model=checkpoint_identity(resolution.local_directory(server_args.model_path, "target model")),
        drafter=checkpoint_identity(drafter),
        dtype=str(worker.model_runner.dtype).removeprefix("torch."),
        tp_size=get_parallel().tp_size,
        attention_backend=str(server_args.attention_backend),
        threads=torch.get_num_threads(),
        gamma=worker.gamma,
        tiers=tuple(sorted(tiers)) if tiers else None,
        sglang=sglang.__version__,
        plugin=__version__,
    )


def _calibration(config: ServingConfig, drafter: Path, gamma: int) -> Calibration | None:
    """The calibration that is asked for or lies beside the drafter; None, said in the log, if it cannot be used."""
    path = config.calibration if config.calibration is not None else drafter / FILE_NAME
    if config.calibration is None and not path.is_file():
        return Calibration.identity(gamma)
    try:
        found = Calibration.load(path, gamma)
    except CheckpointError as error:
        logger.warning("%s Serving with the confidences as they are, corrected by what is observed.", error)
        return None
    logger.info("calibration from %s", path)
    return found
