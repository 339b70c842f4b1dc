"""What a request may ask of sampling, with drafters of every family on real servers: the text of no speculation.

Greedy requests, and sampled ones that leave one choice, are compared token for token with a server that does not
speculate; sampled ones by their distribution with what transformers computes. The drafters are right at times
(tests/oracle_drafters.py), or nothing would be accepted and nothing tested.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from transformers import AutoTokenizer

from tests import rule_breaker, sampled_distribution
from tests.eagle3_models import make_bigram_drafter
from tests.oracle_drafters import known_tokens, make_oracle_dflash, make_oracle_drafter, make_oracle_target
from tests.server import Server, serve, speculation

pytestmark = pytest.mark.real_server

FAMILIES = ("dspark", "dflash", "eagle3")
POLICIES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "truncating": {"policy": "threshold", "threshold": 0.75},
    "truncating less": {"policy": "threshold", "threshold": 0.3},  # a hot draft is never as sure as 0.75
    "adaptive": {"policy": "adaptive"},
    "off": {"policy": "off"},
}
PROMPT = [17, 300, 4, 99, 260, 31]
TOKENS = 48
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 60}, "b": {"enum": ["xy", "z"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
ONE_CHOICE: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 1},
    "top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 1.0},
    "top_k and top_p": {"top_k": 50, "top_p": 1e-6},
    "min_p and frequency": {"min_p": 1.0, "frequency_penalty": 1.5},
}
"""Sampling at temperature 1 that is greedy all the same."""
IMPOSSIBLE = 1e-8
"""P-value of a chi-square test that a right engine does not see: the small cells make the tail a little heavier."""


def features(plain: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Greedy sampling parameters, some of which depend on the answer to a `plain` request."""
    ids, text = plain["output_ids"], plain["text"]
    return {
        "plain": {},
        "frequency": {"frequency_penalty": 1.5},
        "presence": {"presence_penalty": 2.0},
        "frequency and presence": {"frequency_penalty": 0.8, "presence_penalty": 1.2},
        "negative frequency": {"frequency_penalty": -0.7},
        "repetition": {"repetition_penalty": 1.6},
        "logit bias": {"logit_bias": {str(ids[3]): -100.0, str(ids[9]): 5.0}},
        "repetition and logit bias": {"repetition_penalty": 1.6, "logit_bias": {str(ids[9]): 5.0}},
        "grammar": {"json_schema": json.dumps(SCHEMA), "max_new_tokens": 120},
        "stop string": {"stop": [text[70:78]]},
        "stop string kept": {"stop": [text[70:78]], "no_stop_trim": True},
        "stop token": {"stop_token_ids": [ids[21]]},
        "least tokens": {"stop_token_ids": [ids[21]], "min_new_tokens": 30},
    }


NAMES = tuple(features({"output_ids": list(range(TOKENS)), "text": " " * 80}))


def ask(server: Server, sampling: dict[str, Any], **more: Any) -> Any:
    """The answer of /generate, or a list of them when several were asked for."""
    params = {"temperature": 0.0, "max_new_tokens": TOKENS, **sampling}
    body = {"input_ids": PROMPT, "sampling_params": params, **more}
    answer = httpx.post(f"{server.base_url}/generate", json=body, timeout=120.0, trust_env=False)
    return answer.raise_for_status().json()


def ask_at_once(server: Server, plain: dict[str, Any]) -> dict[str, Any]:
    """All features side by side, in batches of whatever mixture."""
    with ThreadPoolExecutor(8) as pool:
        asked = {name: pool.submit(ask, server, sampling) for name, sampling in features(plain).items()}
    return {name: seen(answer.result()) for name, answer in asked.items()}


def seen(answer: dict[str, Any]) -> dict[str, Any]:
    """What a user sees of an answer."""
    return {"ids": answer["output_ids"], "text": answer["text"], "end": answer["meta_info"]["finish_reason"]}


class Reference(NamedTuple):
    """Without speculation."""

    plain: dict[str, Any]
    answers: dict[str, Any]
    logprobs: dict[str, Any]


LOGPROBS: dict[str, Any] = {"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": [7, 80]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    oracle = make_oracle_target(root / "target", loop=6, disturbance=0.13)
    # Less sure than the target: what they draft by differs from what it is accepted by.
    make_oracle_drafter(root / "dspark", oracle, known_tokens(oracle, 0.9), sharpness=0.55)
    make_oracle_dflash(root / "dflash", oracle, sharpness=0.55)
    make_bigram_drafter(root / "eagle3", oracle.config, sharpness=0.55)
    return root


@pytest.fixture(scope="module")
def reference(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    log = tmp_path_factory.mktemp("reference") / "server.log"
    # Under overlap SGLang's plain decoding penalises one token late.
    with serve(models / "target", "--dspark-disable", "--disable-overlap-schedule", log=log) as server:
        plain = ask(server, {})
        return Reference(plain, ask_at_once(server, plain), ask(server, {"frequency_penalty": 1.5}, **LOGPROBS))


class Served(NamedTuple):
    family: str
    server: Server
    directory: Path
    target: Path

    def use(self, policy: str) -> None:
        self.server.use(**POLICIES[policy])

    def a_round(self, what: str, before: dict[str, Any]) -> float:
        """Tokens of a request in a round since the report `before`; `what` is its name of them."""
        now = self.server.report()
        tokens, rounds = (now[name] - before[name] for name in (what, "request_rounds"))
        return float(tokens / rounds)


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp(request.param)
    options, environment = speculation(models / request.param, request.param), rule_breaker.environment(directory)
    with serve(models / "target", *options, log=directory / "server.log", environment=environment) as server:
        yield Served(request.param, server, directory, models / "target")


@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_answers_equal_no_speculation(served: Served, reference: Reference, policy: str) -> None:
    served.use(policy)
    before = served.server.report()
    assert ask_at_once(served.server, reference.plain) == reference.answers
    assert policy in ("adaptive", "off") or served.a_round("output_tokens", before) > 1.2
    assert policy != "truncating" or served.a_round("verified_tokens", before) < 4.9


@pytest.mark.parametrize("name", [name for name in NAMES if name != "plain"])
def test_every_feature_of_these_tests_matters(reference: Reference, name: str) -> None:
    assert reference.answers[name]["ids"] != reference.answers["plain"]["ids"]


def test_a_schema_is_kept(reference: Reference, models: Path) -> None:
    """Of the ids: the tiny tokenizer puts spaces between tokens when it decodes."""
    tokens = AutoTokenizer.from_pretrained(models / "target").convert_ids_to_tokens(reference.answers["grammar"]["ids"])
    found = json.loads("".join(tokens).removesuffix("<eos>"))
    assert set(found) == {"a", "b"}


@pytest.mark.parametrize("policy", ["full", "truncating"])
@pytest.mark.parametrize("name", ONE_CHOICE)
def test_sampling_that_leaves_one_choice_is_greedy(
    served: Served, reference: Reference, policy: str, name: str
) -> None:
    served.use(policy)
    greedy = "frequency" if "frequency" in name else "plain"
    found = ask(served.server, {"temperature": 1.0, **ONE_CHOICE[name]})
    assert found["output_ids"] == reference.answers[greedy]["ids"]


@pytest.mark.parametrize("policy", ["full", "truncating"])
def test_logprobs_equal_no_speculation(served: Served, reference: Reference, policy: str) -> None:
    served.use(policy)
    found = ask(served.server, {"frequency_penalty": 1.5}, **LOGPROBS)["meta_info"]
    expected = reference.logprobs["meta_info"]
    for kind in ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
        flat, flat_expected = ([list(step) for step in numbers(side[kind])] for side in (found, expected))
        assert [step[1] for step in flat] == [step[1] for step in flat_expected]
        assert [step[0] for step in flat] == pytest.approx([step[0] for step in flat_expected], abs=1e-4)


def numbers(steps: list[Any]) -> list[Any]:
    """(logprob, id, text) of all steps, whether there is one or several a step."""
    return [pair for step in steps for pair in (step if isinstance(step[0], list) else [step])]


def test_several_answers_to_one_prompt(served: Served, reference: Reference) -> None:
    served.use("full")
    assert [seen(answer) for answer in ask(served.server, {"n": 2})] == [reference.answers["plain"]] * 2
    sampled = ask(served.server, {"n": 2, "temperature": 1.0})
    assert sampled[0]["output_ids"] != sampled[1]["output_ids"]


@pytest.mark.parametrize("name", ["plain", "stop string"])
def test_streamed_pieces_make_up_the_text(served: Served, reference: Reference, name: str) -> None:
    served.use("full")
    sampling = features(reference.plain)[name]
    body = {"model": "default", "prompt": PROMPT, "temperature": 0, "max_tokens": TOKENS}
    pieces = []
    url = f"{served.server.base_url}/v1/completions"
    with httpx.stream("POST", url, json={**body, **sampling, "stream": True}, timeout=60.0, trust_env=False) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                pieces += [choice["text"] for choice in json.loads(line.removeprefix("data: "))["choices"]]
    assert len(pieces) > 2
    assert "".join(pieces) == reference.answers[name]["text"]


@pytest.mark.parametrize(
    ("policy", "sampling"),
    [
        ("full", {"top_k": 4}),
        ("truncating less", {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05}),
    ],
)
def test_sampled_text_follows_the_target(served: Served, policy: str, sampling: dict[str, Any]) -> None:
    served.use(policy)
    before = served.server.report()
    assert p_value(served, {"temperature": 1.0, **sampling}) > IMPOSSIBLE
    assert 1.2 < served.a_round("output_tokens", before) < 4.0  # drafts are accepted, and others rejected


@pytest.mark.parametrize("how", [rule_breaker.ACCEPTS_ALL, rule_breaker.NO_RESIDUAL])
def test_a_broken_rule_does_not_pass_for_the_target(served: Served, how: str) -> None:
    """Negative control of the test above."""
    served.use("full")
    rule_breaker.break_rule(served.directory, how)
    try:
        assert p_value(served, {"temperature": 1.0, "top_k": 4}) < IMPOSSIBLE
    finally:
        rule_breaker.break_rule(served.directory, "")


def p_value(served: Served, sampling: dict[str, Any], *, tokens: int = 4, samples: int = 1600) -> float:
    """Probability of text as far from the target's distribution as the server's, by a chi-square test."""
    body = {"input_ids": [PROMPT] * samples, "sampling_params": {"max_new_tokens": tokens, **sampling}}
    answers = httpx.post(f"{served.server.base_url}/generate", json=body, timeout=300.0, trust_env=False)
    found = [tuple(answer["output_ids"]) for answer in answers.raise_for_status().json()]
    expected = sampled_distribution.of_text(served.target, PROMPT, tokens, **sampling)
    return sampled_distribution.chi_square(found, expected)
