"""The shipped drafter on the real target in fp32: the text, drafts and acceptance that the definitions ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import torch
from dspark_training.bundle.export import load_bundle
from dspark_training.models.backbone import BlockDrafter
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dspark_serving.assets import ensure_smollm2, shipped_bundle
from tests import draft_spy
from tests.oracle import Decoded, draft_block, speculative_decode
from tests.server import Server, serve

pytestmark = [pytest.mark.real_server, pytest.mark.real_model]

# Small enough that prompts of a hundred tokens are prefilled in pieces and answers cross pages.
OPTIONS = ("--page-size", "16", "--chunked-prefill-size", "64")
QUESTIONS = (
    "A baker makes 24 muffins an hour and sells each for 2 dollars. He bakes for 6 hours and throws 14 muffins away. "
    "How many dollars does he earn? Think step by step, write down every intermediate result, and put the final "
    "answer on a line of its own.",
    "A baker makes 24 muffins an hour and sells each for 2 dollars. He bakes for 6 hours and throws 14 muffins away. "
    "How many muffins does he sell?",
    "Write a Python function that counts the vowels in a string.",
    "Why is the sky blue?",
)
ANSWER_TOKENS = 96
ORACLE_TOKENS = 40


class Servers(NamedTuple):
    stock: Server  # started with --dspark-disable
    dspark: Server
    spied: Path  # where the latter's drafts are written


class Reference(NamedTuple):
    """The oracle's run on one prompt."""

    decoded: Decoded
    drafts_without_features: list[int]  # negative control: the first block of a drafter that does not see the target


@pytest.fixture(scope="module")
def target_path() -> Path:
    return ensure_smollm2("fp32")


@pytest.fixture(scope="module")
def prompts(target_path: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    chats = ([{"role": "user", "content": question}] for question in QUESTIONS)
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]


@pytest.fixture(scope="module")
def servers(target_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    logs, spied = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("spied")
    start = partial(serve, target_path, *OPTIONS, drafter=shipped_bundle())
    environment = draft_spy.environment(spied)
    with (
        start("--dspark-disable", log=logs / "stock.log") as stock,
        start("--dspark-policy", "full", log=logs / "dspark.log", environment=environment) as ours,
    ):
        yield Servers(stock, ours, spied)


@pytest.fixture(scope="module")
def stock_answers(servers: Servers, prompts: list[list[int]]) -> list[dict[str, Any]]:
    assert servers.stock.report() == {"active": False}
    return ask_all(servers.stock, prompts, concurrency=1)


def ask_all(server: Server, prompts: list[list[int]], *, concurrency: int) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda prompt: server.generate(prompt, max_new_tokens=ANSWER_TOKENS), prompts))


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def flush_cache(server: Server) -> None:
    httpx.post(f"{server.base_url}/flush_cache", timeout=30.0, trust_env=False).raise_for_status()


def test_prompts_and_answers_cross_chunks_and_pages(
    prompts: list[list[int]], stock_answers: list[dict[str, Any]]
) -> None:
    assert max(map(len, prompts)) > 64
    assert min(map(len, tokens(stock_answers))) > 2 * 16


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("policy", ["adaptive", "full"])  # the last one stays in force for the other tests
def test_greedy_tokens_equal_stock(
    servers: Servers,
    prompts: list[list[int]],
    stock_answers: list[dict[str, Any]],
    concurrency: int,
    policy: str,
) -> None:
    servers.dspark.use(policy)
    flush_cache(servers.dspark)
    answers = ask_all(servers.dspark, prompts, concurrency=concurrency)
    assert tokens(answers) == tokens(stock_answers)
    if policy == "adaptive":
        return
    rounds = [answer["meta_info"]["spec_verify_ct"] for answer in answers]
    math = slice(0, 2)  # what the drafter knows best
    assert 1.5 * sum(rounds[math]) < sum(map(len, tokens(answers)[math])), "the shipped drafter hardly helps"


def test_cached_prefixes_leave_tokens_as_they_are(
    servers: Servers, prompts: list[list[int]], stock_answers: list[dict[str, Any]]
) -> None:
    first = ask_all(servers.dspark, prompts[:1], concurrency=1)
    asked_again = ask_all(servers.dspark, prompts[:1], concurrency=1)
    assert tokens(first) == tokens(asked_again) == tokens(stock_answers[:1])
    # A prompt that goes on where an answer was cut: its prefix is cached as the rounds of speculation wrote it.
    longer = prompts[0] + tokens(stock_answers)[0][:50] + prompts[2]
    stock, ours = (server.generate(longer) for server in (servers.stock, servers.dspark))
    assert ours["output_ids"] == stock["output_ids"]
    assert asked_again[0]["meta_info"]["cached_tokens"] >= len(prompts[0]) - 16
    assert ours["meta_info"]["cached_tokens"] > len(prompts[0]) + 16


@pytest.mark.parametrize("start", [31, 60, 97])
def test_stop_strings_cut_the_same_text(
    servers: Servers, prompts: list[list[int]], stock_answers: list[dict[str, Any]], start: int
) -> None:
    stop = stock_answers[0]["text"][start : start + 5]  # begins and ends anywhere in a round
    stock, ours = (
        server.generate(prompts[0], max_new_tokens=ANSWER_TOKENS, stop=[stop])
        for server in (servers.stock, servers.dspark)
    )
    assert ours["text"] == stock["text"] == stock_answers[0]["text"].partition(stop)[0]
    assert ours["meta_info"]["finish_reason"] == stock["meta_info"]["finish_reason"]
    assert ours["meta_info"]["finish_reason"]["type"] == "stop"


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_limits_inside_a_round_are_kept(
    servers: Servers, prompts: list[list[int]], stock_answers: list[dict[str, Any]], limit: int
) -> None:
    answer = servers.dspark.generate(prompts[0], max_new_tokens=limit)
    assert answer["output_ids"] == tokens(stock_answers)[0][:limit]
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": limit}


def test_openai_client_streams_the_same_text(servers: Servers, stock_answers: list[dict[str, Any]]) -> None:
    client = openai.OpenAI(base_url=f"{servers.dspark.base_url}/v1", api_key="none", max_retries=0)
    with client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": QUESTIONS[2]}],
        temperature=0,
        max_tokens=ANSWER_TOKENS,
        stream=True,
    ) as stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(list(filter(None, pieces))) > 10
    assert "".join(pieces) == stock_answers[2]["text"]


@pytest.fixture(scope="module")
def references(target_path: Path, prompts: list[list[int]]) -> list[Reference]:
    """The plain loop over transformers and the plain drafter, without any cache, on two prompts."""
    drafter, spec = load_bundle(shipped_bundle())
    assert isinstance(drafter, BlockDrafter)
    target = AutoModelForCausalLM.from_pretrained(target_path, dtype=torch.float32).eval()
    allowed = None if spec.draft_token_ids is None else torch.tensor(spec.draft_token_ids)

    def run(target: PreTrainedModel, prompt: list[int]) -> Reference:
        decoded = speculative_decode(drafter, target, spec.target_layer_ids, prompt, ORACLE_TOKENS, allowed)
        nothing_1TM = torch.zeros(1, len(prompt), len(spec.target_layer_ids) * spec.hidden_size)
        return Reference(decoded, draft_block(drafter, target, nothing_1TM, decoded.tokens[0], allowed))

    return [run(target, prompts[0]), run(target, prompts[2])]


def test_drafts_and_acceptance_equal_the_oracle(
    servers: Servers, prompts: list[list[int]], references: list[Reference]
) -> None:
    flush_cache(servers.dspark)
    for _ in ("with an empty cache", "with the prompts cached"):
        for prompt, (expected, blind) in zip((prompts[0], prompts[2]), references, strict=True):
            answer = servers.dspark.generate(prompt, max_new_tokens=ORACLE_TOKENS)
            drafts = draft_spy.drafts_by_request(servers.spied)[answer["meta_info"]["id"]]
            assert answer["output_ids"] == expected.tokens
            assert drafts == expected.drafts
            assert drafts[0] != blind
            assert answer["meta_info"]["spec_correct_drafts_histogram"] == histogram(expected.accepted)


def histogram(accepted: list[int]) -> list[int]:
    """SGLang's form: how many rounds accepted 0, 1, 2, ... drafts."""
    counts = Counter(accepted)
    return [counts[length] for length in range(max(accepted) + 1)]
