"""Eagle3 drafters on real servers, in fp32: drafts as defined, text as without speculation, whatever else goes on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dspark_serving.drafters import check_fit, make_view, read_spec
from tests import draft_spy
from tests.eagle3_models import LLAMA3_ROPE, Decoded, Drafter, always, make_bigram_pair, make_eagle3, speculative_decode
from tests.published_formats import write_published
from tests.server import Server, serve, speculation
from tests.tiny_models import Arch, make_tiny_target

pytestmark = pytest.mark.real_server

# Prompts of seventy tokens are prefilled in three chunks, and their rows cross pages.
OPTIONS = ("--page-size", "8", "--chunked-prefill-size", "32", "--dspark-policy", "full")
NO_PROFILE = ("--dspark-profile-seconds", "0")
PROMPTS = [[5, 6, 7, 8], list(range(40, 110)), [200] * 9, [17, 300, 4, 99, 260, 31]]
TOKENS = 40
ANSWER = {"max_new_tokens": TOKENS, "ignore_eos": True}


class Spied(NamedTuple):
    server: Server
    directory: Path

    def ask(self, prompt: list[int], **sampling: Any) -> tuple[dict[str, Any], list[list[int]]]:
        """The answer and the blocks that were drafted for it."""
        answer = self.server.generate(prompt, **sampling)
        return answer, draft_spy.drafts_by_request(self.directory).get(answer["meta_info"]["id"], [])

    def confidences(self, rounds: int) -> list[list[float]]:
        """Of the blocks of the last rounds that drafted, which were of one request each."""
        recording = self.server.record(self.directory / "recordings")
        found = [kept.outcome.confidence_RG for kept in recording.rounds]
        return [confidence_RG[0].tolist() for confidence_RG in found if confidence_RG is not None][-rounds:]


@contextmanager
def spied_server(
    target: Path, drafter: Path, root: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Spied]:
    root.mkdir()
    chosen = [*speculation(drafter, "eagle3"), *OPTIONS, "--dspark-recording", str(root / "recordings"), *options]
    variables = {**draft_spy.environment(root), **(environment or {})}
    with serve(target, *chosen, log=root / "server.log", environment=variables) as server:
        yield Spied(server, root)


def load(target: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()


def view_of(drafter: Path, target_config: dict[str, Any], root: Path) -> Path:
    return make_view(check_fit(read_spec(drafter), target_config), root)


class Pair(NamedTuple):
    target: Path
    drafter: Path
    expected: list[Decoded]


def bigram_pair(root: Path, arch: Literal["qwen3", "llama"], *, sparse: bool) -> Pair:
    make_bigram_pair(root / "target", root / "drafter", arch)
    target = load(root / "target")
    drafter = Drafter.read(root / "drafter", target)
    drafts_at = draft_spy.drafts_at if sparse else always
    expected = [speculative_decode(drafter, target, prompt, TOKENS, drafts_at) for prompt in PROMPTS]
    return Pair(root / "target", root / "drafter", expected)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return bigram_pair(tmp_path_factory.mktemp("models"), "qwen3", sparse=False)


@pytest.fixture(scope="module")
def spied(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spied]:
    root = tmp_path_factory.mktemp("full") / "server"
    with spied_server(pair.target, pair.drafter, root) as server:
        yield server


@pytest.fixture(scope="module")
def sparse_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return bigram_pair(tmp_path_factory.mktemp("models"), "llama", sparse=True)


@pytest.fixture(scope="module")
def sparse(sparse_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spied]:
    root = tmp_path_factory.mktemp("sparse") / "server"
    # SGLang's own switch: every so many forwards a request loses its place and is prefilled anew.
    variables = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "15", draft_spy.SPARSE_VARIABLE: "1"}
    # The sparse policy is in force before the profile, which would ask for other ones.
    with spied_server(sparse_pair.target, sparse_pair.drafter, root, *NO_PROFILE, environment=variables) as server:
        yield server


def test_the_drafter_of_these_tests_is_right_at_times(pair: Pair, sparse_pair: Pair) -> None:
    for found in (pair, sparse_pair):
        accepted = {count for decoded in found.expected for count in decoded.accepted}
        assert {0, 1, 4} <= accepted, "acceptance of every kind, or the context of accepted drafts is not tested"


def test_drafts_equal_the_definition_while_some_are_accepted(spied: Spied, pair: Pair) -> None:
    for _ in ("with an empty cache", "with the prompts cached"):
        for prompt, expected in zip(PROMPTS, pair.expected, strict=True):
            answer, drafts = spied.ask(prompt, **ANSWER)
            assert answer["output_ids"] == expected.tokens
            assert drafts == expected.drafts


def test_drafts_after_plain_rounds_equal_the_definition(sparse: Spied, sparse_pair: Pair) -> None:
    for prompt, expected in zip(PROMPTS, sparse_pair.expected, strict=True):
        answer, drafts = sparse.ask(prompt, **ANSWER)
        assert answer["output_ids"] == expected.tokens
        assert drafts == expected.drafts
    assert {"full", "off"} <= set(sparse.server.report()["plans"])


def test_requests_side_by_side_draft_as_if_alone(spied: Spied, pair: Pair) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: spied.server.generate(prompt, **ANSWER), PROMPTS * 3))
    drafts = draft_spy.drafts_by_request(spied.directory)
    for answer, expected in zip(answers, pair.expected * 3, strict=True):
        assert answer["output_ids"] == expected.tokens
        assert drafts[answer["meta_info"]["id"]] == expected.drafts


def test_requests_that_come_go_and_are_retracted_get_their_own_text(sparse: Spied, sparse_pair: Pair) -> None:
    """Slots of the cache change hands all the time, between rounds with drafts and without."""

    def ask_and_hang_up(stop: threading.Event) -> None:
        while not stop.is_set():
            body = {"input_ids": [9, 8, 7], "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{sparse.server.base_url}/generate", json=body, timeout=0.3, trust_env=False)

    stop = threading.Event()
    impatient = threading.Thread(target=ask_and_hang_up, args=(stop,))
    impatient.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda prompt: sparse.server.generate(prompt, **ANSWER), PROMPTS * 8))
    finally:
        stop.set()
        impatient.join()
    assert [answer["output_ids"] for answer in answers] == [decoded.tokens for decoded in sparse_pair.expected] * 8
    assert "#retracted_reqs: 1" in sparse.server.log.read_text()


@pytest.mark.parametrize("policy", ["threshold", "adaptive", "off"])
def test_truncated_blocks_leave_text_as_it_is(spied: Spied, pair: Pair, policy: str) -> None:
    before = spied.server.report()
    spied.server.use(policy, **({"threshold": 0.02} if policy == "threshold" else {}))
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda prompt: spied.server.generate(prompt, **ANSWER), PROMPTS * 3))
    finally:
        spied.server.use("full")
    assert [answer["output_ids"] for answer in answers] == [decoded.tokens for decoded in pair.expected] * 3
    report = spied.server.report()
    rows, rounds = (report[name] - before[name] for name in ("verified_tokens", "request_rounds"))
    assert rounds <= rows < 5 * rounds
    if policy == "threshold":
        assert rounds < rows


def test_sampling_keeps_the_target_distribution(spied: Spied, pair: Pair) -> None:
    """Chi-square of the second token, the first that may have been drafted, over the four that top_k leaves."""
    prompt, trials, kept = PROMPTS[3], 400, 4
    body = {
        "input_ids": [prompt] * trials,
        "sampling_params": {"temperature": 1.0, "top_k": kept, "max_new_tokens": 2, "ignore_eos": True},
    }
    answers = httpx.post(f"{spied.server.base_url}/generate", json=body, timeout=300.0, trust_env=False).json()
    pairs = [tuple(answer["output_ids"]) for answer in answers]
    target = load(pair.target)
    expected: dict[tuple[int, int], float] = {}
    for first, weight in top_k(target, prompt, kept):
        for second, share in top_k(target, [*prompt, first], kept):
            expected[first, second] = weight * share * trials
    assert set(pairs) <= set(expected)
    frequent = [cell for cell, count in expected.items() if count >= 5]
    rest = trials - sum(expected[cell] for cell in frequent)
    statistic = sum((pairs.count(cell) - expected[cell]) ** 2 / expected[cell] for cell in frequent)
    if rest > 0:
        statistic += (sum(cell not in frequent for cell in pairs) - rest) ** 2 / rest
    assert len(frequent) > 4
    assert statistic < 40.0  # p = 0.001 with at most 16 degrees of freedom


@torch.no_grad()
def top_k(target: PreTrainedModel, ids: list[int], count: int) -> list[tuple[int, float]]:
    best = target(torch.tensor([ids])).logits[0, -1].topk(count)
    return list(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))


VARIANTS: dict[str, Arch] = {
    "deepspec-eagle3": "qwen3",
    "deepspec-gemma4-eagle3": "gemma4",
    "llama-eagle3-own-embedding": "llama",
    "speculators-eagle3": "llama",
    "shared-head": "llama",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_published_drafters_draft_as_defined(name: str, tmp_path: Path) -> None:
    """Random weights: hardly a draft is accepted, but every row of the context counts."""
    target_config = make_tiny_target(tmp_path / "target", VARIANTS[name])
    if name == "shared-head":  # not published so: the target's head for some of its tokens, and rotation as in Llama 3
        vocabulary = list(range(20, 480))
        make_eagle3(tmp_path / "drafter", target_config, draft_vocab=vocabulary, rope_parameters=LLAMA3_ROPE)
    else:
        write_published(tmp_path / "drafter", target_config, name)
    view = view_of(tmp_path / "drafter", target_config, tmp_path)
    target = load(tmp_path / "target")
    drafter = Drafter.read(view, target)
    with spied_server(tmp_path / "target", view, tmp_path / "server", *NO_PROFILE) as spied:
        for prompt in PROMPTS[:2]:
            expected = speculative_decode(drafter, target, prompt, 12)
            answer, drafts = spied.ask(prompt, max_new_tokens=12, ignore_eos=True)
            assert answer["output_ids"] == expected.tokens
            assert drafts == expected.drafts
            assert drafts != speculative_decode(without_features(drafter), target, prompt, 12).drafts
            # A greedy draft is as certain as it is probable; so logits are seen, and not only their order.
            confidences = torch.tensor(spied.confidences(len(drafts)))
            torch.testing.assert_close(confidences, torch.tensor(expected.probabilities), rtol=1e-3, atol=1e-6)
        sampled = spied.server.generate(PROMPTS[1], temperature=1.0, top_p=0.9, max_new_tokens=12, ignore_eos=True)
        assert len(sampled["output_ids"]) == 12
        config = json.loads((view / "config.json").read_text())
        assert len(drafts[0]) == config["block_size"]


def without_features(drafter: Drafter) -> Drafter:
    """Negative control: the drafter without the target's features."""
    weights = drafter.weights | {"fc.weight": torch.zeros_like(drafter.weights["fc.weight"])}
    return drafter._replace(weights=weights)
