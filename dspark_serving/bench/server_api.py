"""What a measurement asks of a server, beside its answers: empty caches, another policy, counters."""

from __future__ import annotations

from typing import Any, NamedTuple

import httpx

from dspark_serving.bench.arms import PolicyChoice
from dspark_serving.errors import EnvironmentMismatchError

_SECONDS = 60.0


class Counters(NamedTuple):
    """Totals since a server's start, or of one run when two readings are subtracted."""

    rounds: int  # of the batch
    request_rounds: float  # one for each request of each round
    tokens: float  # accepted, bonus tokens included, the prefills' tokens not
    verified_tokens: float | None  # anchors included; None where the server does not say
    phase_seconds: dict[str, float]

    def since(self, before: Counters) -> Counters:
        """What was added after `before` was read."""
        verified = None
        if self.verified_tokens is not None and before.verified_tokens is not None:
            verified = self.verified_tokens - before.verified_tokens
        return Counters(
            rounds=self.rounds - before.rounds,
            request_rounds=self.request_rounds - before.request_rounds,
            tokens=self.tokens - before.tokens,
            verified_tokens=verified,
            phase_seconds={
                phase: seconds - before.phase_seconds.get(phase, 0.0) for phase, seconds in self.phase_seconds.items()
            },
        )


def flush_cache(url: str) -> None:
    """Empty the server's radix cache and the n-gram store of its NGRAM; SGLang's own averages begin again."""
    _call(url, "POST", "/flush_cache", timeout=_SECONDS)


def set_policy(url: str, choice: PolicyChoice) -> None:
    """Switch the policy of the server's scheduler and see that it took it.

    Raises:
        EnvironmentMismatchError: the server has no such route, refuses the policy, or says that it has another.
    """
    body = {"policy": choice.policy} | ({} if choice.threshold is None else {"threshold": choice.threshold})
    _call(url, "POST", "/dspark/policy", json=body)
    now = _plugin_report(server_info(url)).get("policy")
    if now != choice.policy:
        raise EnvironmentMismatchError(
            f"{url} has the policy {now!r} after it was set to {choice.policy!r}",
            expected="the policy that was asked for",
            fix="See the server's log.",
        )


def server_info(url: str) -> dict[str, Any]:
    """The server's arguments and internal states."""
    return dict(_call(url, "GET", "/server_info").json())


def plugin_counters(info: dict[str, Any]) -> Counters | None:
    """The plugin's totals; None where it serves no speculation."""
    report = _plugin_report(info)
    if "request_rounds" not in report:
        return None
    return Counters(
        rounds=report["rounds"],
        request_rounds=report["request_rounds"],
        tokens=report["output_tokens"],
        verified_tokens=report.get("verified_tokens"),
        phase_seconds=dict(report.get("phase_seconds_total", {})),
    )


def sglang_counters(info: dict[str, Any], tokens: int) -> Counters | None:
    """Rounds of SGLang's own speculation since the last flush, from its mean accepted length.

    Args:
        info: of a server that answers nobody at the moment.
        tokens: made by rounds since the flush, so without the prefills' tokens.

    Returns:
        None without speculation. SGLang's mean lacks the rounds after its last log line: launch the server with
        `--decode-log-interval 1` for an exact one.
    """
    length = _internal_state(info).get("avg_spec_accept_length")
    if not length:
        return None
    rounds = tokens / length
    a_round = info.get("speculative_num_draft_tokens")
    return Counters(0, rounds, tokens, rounds * a_round if a_round else None, {})


def _plugin_report(info: dict[str, Any]) -> dict[str, Any]:
    return dict(_internal_state(info).get("dspark") or {})


def _internal_state(info: dict[str, Any]) -> dict[str, Any]:
    states = info.get("internal_states") or [{}]
    return dict(states[0])


def _call(url: str, method: str, route: str, **options: Any) -> httpx.Response:
    try:
        with httpx.Client(trust_env=False, timeout=options.pop("timeout", _SECONDS)) as client:
            return client.request(method, url + route, **options).raise_for_status()
    except httpx.HTTPError as error:
        said = f": {error.response.text.strip()[:300]}" if isinstance(error, httpx.HTTPStatusError) else ""
        raise EnvironmentMismatchError(
            f"{method} {url}{route} failed ({error}){said}",
            expected="an SGLang server that answers there",
            fix="See that it runs, and with the plugin where policies are switched.",
        ) from error
