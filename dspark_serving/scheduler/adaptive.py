"""The default policy: a price for a verified token, known beforehand, that each fresh survival must beat.

Rate theory: the policy with the most tokens a second maximises, in every round, tokens - rho * seconds, with rho its
own long-run rate. So a position is worth verifying while weight * survival >= rho * (seconds a verified token adds).
rho and those seconds change slowly and are known from earlier rounds; only the survivals are fresh, which makes the
choice causal and the text exact. Where captured graphs make the tokens of a tier free, the price is 0 and the tier's
end is the capacity (DSpark paper, section 5.2).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np

from dspark_serving.scheduler.admission import Totals, admit, candidate_totals, values
from dspark_serving.scheduler.cost import CostModel
from dspark_serving.scheduler.floors import SpeedFloors
from dspark_serving.scheduler.gate import DraftGate, SlowRatio, TimeBias, regime
from dspark_serving.scheduler.outlook import Prospect, weigh
from dspark_serving.scheduler.round import Batch, Outcome, Plan, Terms
from dspark_serving.scheduler.survival import AcceptancePrior, HostHistory, Recalibration, calibrated

logger = logging.getLogger(__name__)

_ROWS = 64
"""Requests' rounds by which a batch is judged, at least: one request is judged by its last 32, 64 requests by the last
one of each, more of them by that of every second, third, ... in turn."""

_FEW = 8
"""Requests of a batch that is too small to be judged by the drafts which pay."""

_TRIAL = 32
"""Rounds after which a tier may be tried whose time is in doubt: what is never visited stays as it was predicted."""

_SURPRISE = 0.15
"""Logarithm of measured over predicted seconds beyond which a plain round is soon followed by another one."""


@dataclass
class Incidents:
    """What came in that could not be used."""

    bad_confidences: int = 0
    bad_outcomes: int = 0
    unmet_floors: int = 0


class AdaptivePolicy:
    """Price, capacity and whether to draft at all, from a cost model and earlier rounds."""

    name = "adaptive"

    def __init__(
        self,
        gamma: int,
        slots: int,
        cost: CostModel,
        calibration: Recalibration | None = None,
        *,
        speed_floor: float = 0.0,
        gate: DraftGate | None = None,
    ) -> None:
        """Start without experience.

        Args:
            gamma: drafted tokens a block.
            slots: requests that the engine can hold; `Batch.slots_R` lies below.
            cost: predicts seconds and is refined by `observe`.
            calibration: of the confidences; refined by `observe`.
            speed_floor: tokens a second that every request should get (goodput); 0: the throughput of all counts.
            gate: decides when drafting stops and starts.
        """
        self.incidents = Incidents()
        self._gamma = gamma
        self._cost = cost
        self._calibration = calibration
        self._gate = gate or DraftGate()
        self._prior = AcceptancePrior(gamma)
        self._history = HostHistory(gamma, slots)
        self._floors = SpeedFloors(slots, everyone=speed_floor)
        self._greedy_realism = SlowRatio(strength=16.0, memory=512.0)
        self._sampled_realism = SlowRatio(strength=16.0, memory=512.0)
        self._draft_time = TimeBias(prior=2.0)
        self._plain_time = TimeBias(prior=0.5)  # rarely looked at while drafts pay: each look has to count
        self._totals: dict[int, Totals] = {}
        self._until_trial = _TRIAL
        self._warned: set[str] = set()

    def realism(self, *, sampled: bool) -> float:
        """Accepted drafts by expected ones, lately, of sampled or greedy traffic: 1 when the confidences are right."""
        return (self._sampled_realism if sampled else self._greedy_realism).value

    # ---- before the drafts

    def plan(self, batch: Batch) -> Plan:
        """Decide from earlier rounds; as fast for 512 requests as for 64."""
        requests = batch.requests
        if requests == 0:
            return Plan(False, 0.0, 0, "off", 0.0, 0.0)
        if not self._cost.known:
            self._warn_once("no-cost-data", "no cost data: every drafted token is verified until there is a profile")
            return Plan(True, 0.0, requests * self._gamma, "no-cost-data", math.nan, math.nan)
        context, sampled = int(np.add.reduce(batch.context_R)), batch.sampled
        looking = self._gate.looking
        newcomers = self._history.newcomers(batch) if self._gate.resting else 0
        if self._gate.rests(requests, context, newcomers):
            return self._plain(requests, context, sampled, "off")
        prospect = self._prospect(batch, context, sampled)
        outlook = weigh(prospect)
        if outlook.reason == "floor-unmet":
            self.incidents.unmet_floors += 1
            self._warn_once("floor-unmet", "a request's floor of tokens a second cannot be met at the present load")
        verdict = self._gate.decide(outlook.advantage, requests, context, sampled)
        if verdict in ("off", "plain-probe"):
            return self._plain(requests, context, sampled, "off" if verdict == "off" else "probe")
        plan = Plan(True, outlook.price, outlook.capacity, outlook.reason, outlook.tokens, outlook.seconds)
        if verdict == "probe" and not looking:
            self._history.forget()
            self._prior.doubt(8.0)
        if verdict in ("warm-up", "probe"):  # what is learned from a draft is worth a little more than its tokens,
            discount = 0.5 * min(_FEW / requests, 1.0)  # unless the batch teaches enough by those that pay anyway
            return plan._replace(price=(1.0 - discount) * plan.price, reason=verdict)
        free = outlook.reason == "tier" and prospect.floor_R is None  # a trial could break a floor
        return self._trial(prospect, plan) if free else plan

    def _trial(self, prospect: Prospect, plan: Plan) -> Plan:
        """The plan; now and then what would be best if each tier were as fast as it may be."""
        self._until_trial -= 1
        if self._until_trial > 0:
            return plan
        self._until_trial = _TRIAL
        total_N, drafts_N, _ = prospect.totals
        doubt_N = self._cost.doubt(prospect.requests, total_N)
        hoped = weigh(prospect._replace(seconds_N=prospect.seconds_N * (1.0 - doubt_N)))
        if hoped.capacity == plan.capacity:
            return plan
        seconds = float(prospect.seconds_N[drafts_N.searchsorted(hoped.capacity)])
        return Plan(True, hoped.price, hoped.capacity, "trial", hoped.tokens, seconds)

    def _plain(self, requests: int, context: int, sampled: int, reason: str) -> Plan:
        seconds = self._plain_time.value(regime(requests, sampled)) * self._cost.plain(requests, context, sampled)
        return Plan(False, 0.0, 0, reason, float(requests), seconds)

    def _prospect(self, batch: Batch, context: int, sampled: int) -> Prospect:
        """What earlier rounds and the cost model say of this batch."""
        requests = batch.requests
        totals = self._totals.get(requests)
        if totals is None:
            totals = self._totals[requests] = candidate_totals(requests, self._gamma, self._cost.tiers)
        load = regime(requests, sampled)
        seconds_N = self._draft_time.value(load) * (
            self._cost.verify(requests, totals.total_N, context, sampled) + self._cost.draft(requests, sampled)
        )
        floor_R, weight_R = self._floors.demands(batch)
        return Prospect(
            requests,
            self._expected_survivals(batch, whole=floor_R is not None or weight_R is not None),
            weight_R,
            floor_R,
            self.realism(sampled=2 * sampled > requests),
            totals,
            seconds_N,
            self._plain_time.value(load) * self._cost.plain(requests, context, sampled),
            self._cost.tiers is not None,
        )

    def _expected_survivals(self, batch: Batch, *, whole: bool) -> np.ndarray:
        """Earlier rounds of the requests, as many as make a fair sample, [S, H, G]; of all of them if `whole`."""
        enough = -(-_ROWS // batch.requests)
        fewest = 1 if self._gate.looking else -(-enough // 4)
        step = 1 if whole else max(batch.requests // _ROWS, 1)
        return self._history.sample(batch, fewest, enough, self._prior.survival_G, step)

    # ---- with the drafts

    def admit(self, batch: Batch, plan: Plan, confidence_RG: np.ndarray) -> np.ndarray:
        """Fresh survivals against the plan."""
        requests, gamma = confidence_RG.shape
        if plan.price <= 0.0 and plan.capacity >= requests * gamma:
            return np.full(requests, gamma + 1, dtype=np.int32)
        confidence_RG, _ = self._calibrated(batch, confidence_RG)
        return admit(values(confidence_RG, self._floors.demands(batch).weight_R), plan.price, plan.capacity)

    def terms(self, batch: Batch) -> Terms | None:
        """Weights, raised where a floor is not met, and the calibration as learned so far."""
        if self._calibration is None:
            return None
        weight_R = self._floors.demands(batch).weight_R
        ones_R = np.ones(batch.requests, dtype=np.float32)
        return Terms(ones_R if weight_R is None else weight_R, self._calibration.line_2BG)

    def _calibrated(self, batch: Batch, confidence_RG: np.ndarray) -> tuple[np.ndarray, int]:
        calibrate = None if self._calibration is None else self._calibration.apply
        return calibrated(confidence_RG, batch.temperature_R, calibrate)

    # ---- after the round

    def observe(self, outcome: Outcome) -> None:
        """Learn acceptance, and, from steady rounds, time; what cannot be is counted and ignored."""
        requests = outcome.batch.requests
        if requests == 0:
            return
        self._history.pass_round()
        drafted = outcome.plan.drafts and outcome.confidence_RG is not None
        drafts_R = outcome.verify_lens_R - 1
        if not ((outcome.accepted_R >= 0) & (outcome.accepted_R <= drafts_R) & (drafts_R <= self._gamma)).all():
            self._reject("verify lengths or accepted drafts out of range")
            return
        if outcome.confidence_RG is not None and drafted:
            self._learn_acceptance(outcome, outcome.confidence_RG)
        if outcome.steady:
            self._learn_time(outcome, drafted)
        judged = drafted and outcome.steady and self._gate.looking
        self._gate.observe(drafted, self._lost(outcome) if judged else 0.0)

    def _lost(self, outcome: Outcome) -> float:
        """What a drafting round took beyond the time of as many tokens without drafts, in plain rounds."""
        batch = outcome.batch
        plain = self._plain(batch.requests, int(batch.context_R.sum()), batch.sampled, "off")
        rounds = outcome.seconds / plain.expected_seconds
        if not 0.0 < rounds < math.inf:  # impossible times, or no cost data
            return 0.0
        return rounds - 1.0 - float(outcome.accepted_R.sum()) / batch.requests

    def _learn_acceptance(self, outcome: Outcome, raw_RG: np.ndarray) -> None:
        batch = outcome.batch
        confidence_RG, bad = self._calibrated(batch, raw_RG)
        survival_RG = np.multiply.accumulate(confidence_RG, axis=1)
        verified_RG = np.arange(self._gamma) < (outcome.verify_lens_R - 1)[:, None]
        if bad:
            self.incidents.bad_confidences += bad
            self._warn_once(
                "bad-confidence", "confidences that are no probabilities count as 1: their drafts are verified"
            )
        elif self._calibration is not None:
            self._calibration.observe(raw_RG, outcome.verify_lens_R, outcome.accepted_R, batch.temperature_R)
        expected = float(np.where(verified_RG, survival_RG, 0.0).sum())
        realism = self._sampled_realism if 2 * batch.sampled > batch.requests else self._greedy_realism
        realism.observe(float(outcome.accepted_R.sum()), expected)
        self._prior.observe(confidence_RG, outcome.verify_lens_R, outcome.accepted_R)
        self._history.observe(batch, survival_RG)

    def _learn_time(self, outcome: Outcome, drafted: bool) -> None:
        seconds, draft_seconds = outcome.seconds, outcome.draft_seconds
        if not (0.0 < seconds < math.inf and 0.0 <= draft_seconds < seconds):
            self._reject("impossible times of a round")
            return
        batch = outcome.batch
        requests, context, sampled = batch.requests, int(batch.context_R.sum()), batch.sampled
        tokens = int(outcome.verify_lens_R.sum())
        self._cost.observe(requests, tokens, context, draft_seconds, seconds, drafted, sampled)
        if self._cost.known:  # against the refined model: what it learns by itself needs no second correction
            load = regime(requests, sampled)
            bias, other = (self._draft_time, self._plain_time) if drafted else (self._plain_time, self._draft_time)
            error = bias.observe(load, seconds, self._cost.seconds(requests, tokens, context, drafted, sampled))
            other.doubt(load)
            if not drafted and abs(error) > _SURPRISE:
                self._gate.surprised(load)
        self._floors.observe(batch, outcome.accepted_R + 1, seconds)

    def _reject(self, what: str) -> None:
        self.incidents.bad_outcomes += 1
        self._warn_once(what, f"{what}: such rounds are ignored")

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message)
