"""The same questions to a running SGLang server with the plugin, through its OpenAI-compatible route."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from dspark_serving.bench.server_api import Counters, plugin_counters, server_info
from dspark_serving.errors import EnvironmentMismatchError
from dspark_training.evaluation.records import Record
from dspark_training.evaluation.subjects import Ask

_SECONDS = 600.0  # an answer may take
_PIECE = 8  # questions for each request under way: what a lost server had answered before is kept


class LiveSubject:
    """A server and the drafter that it serves.

    Args:
        name: how results call it.
        url: without a path.
        concurrency: requests under way.

    Raises:
        EnvironmentMismatchError: nobody answers there.
    """

    calibration = None

    def __init__(self, name: str, url: str, *, concurrency: int, seed: int) -> None:
        self.name, self._url, self._concurrency, self._seed = name, url.rstrip("/"), concurrency, seed
        info = server_info(self._url)
        drafts = info.get("speculative_num_draft_tokens")
        self.gamma = int(drafts) - 1 if drafts else None
        self.family = None if plugin_counters(info) is None else str(info.get("speculative_algorithm") or "").lower()
        self._served = {key: info.get(key) for key in ("model_path", "speculative_draft_model_path")}

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"how": "server", "url": self._url, "concurrency": self._concurrency, "seed": self._seed, **self._served}

    def answer(self, asks: Sequence[Ask], temperature: float, max_tokens: int) -> Iterator[list[Record]]:
        """All turns asked, `concurrency` at a time, in pieces: times and counters are of a piece together."""
        size = _PIECE * self._concurrency
        with httpx.Client(trust_env=False, timeout=_SECONDS) as client, ThreadPoolExecutor(self._concurrency) as pool:
            for first in range(0, len(asks), size):
                piece = asks[first : first + size]
                before = plugin_counters(server_info(self._url))
                start = time.perf_counter()
                bodies = list(pool.map(lambda ask: self._chat(client, ask, temperature, max_tokens), piece))
                seconds = (time.perf_counter() - start) / len(piece)
                records = [_record(ask, body, seconds) for ask, body in zip(piece, bodies, strict=True)]
                after = plugin_counters(server_info(self._url))
                if before is not None and after is not None:
                    _check_rounds(records, after.since(before))
                yield records

    def _chat(self, client: httpx.Client, ask: Ask, temperature: float, max_tokens: int) -> dict[str, Any]:
        request = {
            "model": "default",
            "messages": ask.messages,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": self._seed,
            "return_spec_tokens_details": True,
        }
        try:
            return dict(client.post(f"{self._url}/v1/chat/completions", json=request).raise_for_status().json())
        except (httpx.HTTPError, ValueError) as error:
            raise EnvironmentMismatchError(
                f"{self._url} did not answer a question ({error})",
                expected="a chat completion",
                fix="See the server's log; the same command goes on behind the answers that are kept.",
            ) from error


def _record(ask: Ask, body: dict[str, Any], seconds: float) -> Record:
    details = (body.get("sglext") or {}).get("spec_tokens_details") or {}
    histogram = details.get("spec_correct_drafts_histogram") or []
    tokens, rounds = int(body["usage"]["completion_tokens"]), int(details.get("spec_verify_ct") or 0)
    return Record(
        question=ask.question.key,
        turn=ask.turn,
        domain=ask.question.domain,
        text=str(body["choices"][0]["message"]["content"] or ""),
        output_tokens=tokens,
        seconds=seconds,
        rounds=rounds,
        round_tokens=tokens - 1 if rounds else 0,
        accepted=[kept for kept, count in enumerate(histogram) for _ in range(count)],
    )


def _check_rounds(records: Sequence[Record], counters: Counters) -> None:
    """The rounds that the answers report must be those that the server counted.

    Raises:
        EnvironmentMismatchError: they are not: somebody else used the server, and its times mean nothing.
    """
    reported = sum(record.rounds for record in records)
    # A server that overlaps rounds may run one more of a request that has ended.
    if not reported <= counters.request_rounds <= reported + 2 * len(records):
        raise EnvironmentMismatchError(
            f"the server counted {counters.request_rounds:g} rounds, its answers report {reported}",
            expected="the same",
            fix="See that nobody else uses the server, and evaluate again.",
        )
