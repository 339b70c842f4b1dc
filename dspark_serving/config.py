"""The options of the serving plugin, declared once.

The command line (`--dspark-<name>`), the environment (`DSPARK_<NAME>`) and the docs are made from the fields below.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dspark_serving.errors import OptionError

PolicyName = Literal["adaptive", "full", "threshold", "algorithm1", "native", "off"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


class ServingConfig(BaseModel):
    """Validated options of one server; immutable, and small enough to travel with SGLang's server arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: PolicyName = Field(
        default="adaptive",
        description="which drafted tokens are verified: those that pay at the present load, drafting itself switched "
        "off when it does not pay (adaptive); all of them (full); those whose survival reaches the threshold "
        "(threshold); the paper's Algorithm 1 (algorithm1); SGLang's own budget with this server's profile (native); "
        "none, without drafting (off)",
    )
    threshold: float = Field(
        default=0.3,
        ge=0.0,
        le=1.0,
        description="policy threshold: the survival (product of confidences) below which a position is not verified",
    )
    speed_floor: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="policy adaptive: tokens a second that every request should get at least; 0 for the most "
        "throughput",
    )
    calibration: Path | None = Field(
        default=None,
        description="calibration of the confidences, from `dspark calibrate`; else calibration.json beside the "
        "drafter, if there is one",
    )
    profile_seconds: float = Field(
        default=15.0,
        ge=0.0,
        allow_inf_nan=False,
        description="time at start-up for measuring rounds, at most; 0 to go without",
    )
    recording: Path | None = Field(
        default=None, description="directory for recordings of rounds, made on demand and on anomalies; else none"
    )
    disable: bool = Field(
        default=False,
        description="serve exactly as SGLang does without this plugin; where its own DSPARK cannot run "
        "(no accelerator), without speculation",
    )


def flag(name: str) -> str:
    """The command-line flag of an option: `--dspark-policy` for `policy`."""
    return "--dspark-" + name.replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of an option: `DSPARK_POLICY` for `policy`."""
    return "DSPARK_" + name.upper()


def load_config(given: Mapping[str, Any], environ: Mapping[str, str]) -> ServingConfig:
    """The options from `given` values (command line), else the environment, else the defaults.

    Raises:
        OptionError: a value is out of its bounds; names the flag and the variable.
    """
    values = {name: environ[variable(name)] for name in ServingConfig.model_fields if variable(name) in environ}
    values.update(given)
    try:
        return ServingConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise OptionError(
            f"{flag(name)} (or {variable(name)}) is {first['input']!r}",
            expected=first["msg"][0].lower() + first["msg"][1:],
            fix="Correct the option.",
        ) from error
