"""The policies by name, and what they are made of."""

from __future__ import annotations

from typing import NamedTuple

from dspark_serving.errors import OptionError
from dspark_serving.scheduler.adaptive import AdaptivePolicy
from dspark_serving.scheduler.baselines import Algorithm1Policy, FullPolicy, OffPolicy, ThresholdPolicy
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.cost import CostModel
from dspark_serving.scheduler.recalibration import OnlineCalibration
from dspark_serving.scheduler.round import Policy
from dspark_serving.scheduler.survival import Calibrate


class PolicyParts(NamedTuple):
    """What a policy is made of; the same for all policies of a server, whichever is in force."""

    gamma: int  # drafted tokens a block
    slots: int  # requests that the engine can hold
    cost: CostModel
    calibration: Calibration
    threshold: float  # survival below which policy threshold does not verify
    speed_floor: float  # tokens a second that policy adaptive grants every request; 0: the throughput of all counts


POLICIES = ("adaptive", "full", "threshold", "algorithm1", "off")


def make_policy(name: str, parts: PolicyParts, recalibration: OnlineCalibration | None = None) -> Policy:
    """A policy without memory of earlier rounds.

    Args:
        recalibration: what policy adaptive keeps calibrated; default: a new one. The others don't recalibrate.

    Raises:
        OptionError: no policy has this name.
    """
    match name:
        case "adaptive":
            recalibration = recalibration or OnlineCalibration(parts.calibration)
            return AdaptivePolicy(parts.gamma, parts.slots, parts.cost, recalibration, speed_floor=parts.speed_floor)
        case "full":
            return FullPolicy()
        case "threshold":
            line_2BG = OnlineCalibration(parts.calibration).line_2BG
            return ThresholdPolicy(parts.threshold, _frozen(parts.calibration), line_2BG)
        case "algorithm1":
            return Algorithm1Policy(parts.cost, _frozen(parts.calibration))
        case "off":
            return OffPolicy()
    raise OptionError(f"there is no policy {name!r}", expected=f"one of {', '.join(POLICIES)}", fix="Name one of them.")


def _frozen(calibration: Calibration) -> Calibrate:
    return lambda confidence_RG, temperature_R: calibration.apply(confidence_RG)
