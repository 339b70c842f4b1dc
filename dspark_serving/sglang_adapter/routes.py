"""Switching the policy and asking for a recording while the server runs.

The HTTP process hands both to the schedulers through SGLang's own update of internal state, which carries numbers only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from sglang.srt.managers.io_struct import SetInternalStateReq
from sglang.srt.utils.auth import AuthLevel, auth_level

from dspark_serving.config import POLICIES, PolicyName

POLICY_KEY, THRESHOLD_KEY, DUMP_KEY = "dspark_policy", "dspark_threshold", "dspark_dump"
AS_STARTED = -1.0
"""In the place of a threshold: the one that the server was started with."""


class PolicyRequest(BaseModel):
    """Body of POST /dspark/policy."""

    model_config = ConfigDict(extra="forbid")

    policy: PolicyName
    threshold: float | None = Field(None, ge=0.0, le=1.0, description="for policy threshold; as started if absent")


def router(state: Callable[[], Any]) -> APIRouter:
    """The /dspark routes, with the access rules of SGLang's own updates.

    Args:
        state: gives SGLang's global state of the HTTP process, which exists only once that runs.
    """
    routes = APIRouter(prefix="/dspark")

    async def update(values: dict[str, int | float]) -> None:
        if not all(await state().tokenizer_manager.set_internal_state(SetInternalStateReq(server_args=values))):
            raise HTTPException(409, "the scheduler refused; its log says why. dspark-serving must be active.")

    @routes.post("/policy")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def set_policy(request: PolicyRequest) -> dict[str, Any]:
        """Use another policy from the next round on; requests go on where they are."""
        values: dict[str, int | float] = {POLICY_KEY: POLICIES.index(request.policy)}
        if request.policy == "threshold":
            values = {THRESHOLD_KEY: AS_STARTED if request.threshold is None else request.threshold} | values
        await update(values)
        return {"policy": request.policy}

    @routes.post("/recording")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def dump_recording() -> dict[str, Any]:
        """Write the newest rounds to a file in the server's recording directory, which appears when it is complete.

        The log has its name.
        """
        await update({DUMP_KEY: 1})
        return {"recording": True}

    return routes
