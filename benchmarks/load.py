"""A closed loop of users at a server: a fixed number of streamed chat requests under way, prompts in a fixed order.

SGLang's own client (`python -m sglang.benchmark.serving`) is not used here: it takes 8 seconds to start, which a
measurement of 100 points pays 100 times on the cores it measures, and its output lacks the rounds and verified tokens
of a request.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from openai import AsyncOpenAI

from dspark_serving.errors import DataError

DATASETS = {"gsm8k": "gsm8k_test", "humaneval": "humaneval", "chat": "chat"}
_PROMPTS = Path(__file__).parent / "prompts"
_ANSWER_SECONDS = 600.0


class Sample(NamedTuple):
    """One streamed answer; times are seconds of `time.perf_counter`."""

    prompt: int  # its place in the list of prompts
    text: str
    output_tokens: int
    start: float
    arrivals: tuple[float, ...]  # of the chunks with text; one chunk may bring several tokens
    end: float
    rounds: int | None  # target forwards after prefill; None without speculation
    verified_tokens: float | None  # over all rounds, anchors included; None without speculation


def read_prompts(dataset: str, count: int) -> list[str]:
    """The first `count` prompts of a dataset.

    Raises:
        DataError: it has fewer.
    """
    path = _PROMPTS / f"{DATASETS[dataset]}.jsonl"
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    if count > len(prompts):
        raise DataError(f"{path} has {len(prompts)} prompts", expected=f"{count}", fix="Ask for fewer with --prompts.")
    return prompts[:count]


def run_load(url: str, prompts: Sequence[str], *, concurrency: int, max_tokens: int) -> tuple[Sample, ...]:
    """Send every prompt once, greedily, with `concurrency` requests under way; samples in the order of the prompts.

    Raises:
        openai.OpenAIError: the server refuses a request, dies, or takes longer than ten minutes for one.
    """
    return asyncio.run(_run_load(url, prompts, concurrency, max_tokens))


def flush_cache(url: str) -> None:
    """Empty the server's radix cache, and the n-gram store of its NGRAM, so that no prompt was seen before."""
    httpx.post(f"{url}/flush_cache", timeout=60.0, trust_env=False).raise_for_status()


def server_report(url: str) -> dict[str, Any]:
    """What the plugin shows in /server_info; {"active": False} where it serves no speculation."""
    info = httpx.get(f"{url}/server_info", timeout=60.0, trust_env=False).raise_for_status().json()
    return dict(info["internal_states"][0]["dspark"])


async def _run_load(url: str, prompts: Sequence[str], concurrency: int, max_tokens: int) -> tuple[Sample, ...]:
    waiting = iter(enumerate(prompts))
    samples: list[Sample] = []

    async def user(client: AsyncOpenAI) -> None:
        for index, prompt in waiting:  # shared by all users: each takes the next one
            samples.append(await _ask(client, index, prompt, max_tokens))

    http_client = httpx.AsyncClient(trust_env=False, timeout=_ANSWER_SECONDS)
    async with (
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http_client) as client,
        asyncio.TaskGroup() as users,
    ):
        for _ in range(concurrency):
            users.create_task(user(client))
    return tuple(sorted(samples))


async def _ask(client: AsyncOpenAI, index: int, prompt: str, max_tokens: int) -> Sample:
    start = time.perf_counter()
    stream = await client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_spec_tokens_details": True},
    )
    pieces, arrivals, output_tokens, details = [], [], 0, None
    async for chunk in stream:
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            arrivals.append(time.perf_counter())
            pieces.append(text)
        if chunk.usage is not None:
            output_tokens = chunk.usage.completion_tokens
        details = (getattr(chunk, "sglext", None) or {}).get("spec_tokens_details") or details
    end = time.perf_counter()
    rounds, verified = _verification(details)
    return Sample(index, "".join(pieces), output_tokens, start, tuple(arrivals), end, rounds, verified)


def _verification(details: dict[str, Any] | None) -> tuple[int | None, float | None]:
    """Rounds and verified tokens of a request, from SGLang's `spec_tokens_details`."""
    if details is None:
        return None, None
    rounds = details["spec_verify_ct"]
    # The length to which SGLang cut the verification, where it did; else every proposed draft was verified.
    a_round = details["spec_cap_length"] or details["spec_num_proposed_drafts"] / max(rounds, 1) + 1
    return rounds, rounds * a_round
