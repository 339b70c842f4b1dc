"""Drafters without a confidence head on a real server: scheduled by confidences estimated from their distributions.

The drafter knows the bigrams of the target in part (tests/oracle_drafters.py), so that something is accepted and
something is not worth verifying. One server serves all policies.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dspark_serving.recording import replay
from dspark_serving.recording.labels import labels_of
from dspark_serving.recording.rounds import NEVER
from dspark_serving.scheduler.adaptive import AdaptivePolicy
from dspark_serving.scheduler.calibration_fit import fit_temperatures
from tests.oracle_drafters import (
    known_tokens,
    make_oracle_dflash,
    make_oracle_drafter,
    make_oracle_eagle3,
    make_oracle_target,
)
from tests.scheduler_worlds import LinearCosts
from tests.server import Server, serve, speculation

pytestmark = pytest.mark.real_server

GAMMA = 4
PROMPTS = [[5, 6, 7, 8], list(range(40, 110)), [200] * 9, [17, 300, 4, 99, 260, 31]]


class Counts(NamedTuple):
    """What the server counted while it answered."""

    texts: list[list[int]]
    rounds: int  # of a request
    verified: int  # tokens, anchors included
    tokens: int  # committed in these rounds

    @property
    def accepted_length(self) -> float:
        """Tokens a round, the bonus token included."""
        return self.tokens / self.rounds


class Headless(NamedTuple):
    server: Server
    recordings: Path

    def answer(self, policy: str, *, concurrency: int = 1) -> Counts:
        self.server.use(policy)
        before = self.server.report()
        texts = generate(self.server, concurrency)
        names = ("request_rounds", "verified_tokens", "output_tokens")
        after = self.server.report()
        return Counts(texts, *(after[name] - before[name] for name in names))


def generate(server: Server, concurrency: int) -> list[list[int]]:
    with ThreadPoolExecutor(concurrency) as pool:
        answers = pool.map(lambda prompt: server.generate(prompt, max_new_tokens=96, ignore_eos=True), PROMPTS)
    return [answer["output_ids"] for answer in answers]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    oracle = make_oracle_target(root / "target")
    make_oracle_drafter(root / "dspark", oracle, known_tokens(oracle, 0.6), gamma=GAMMA)
    make_oracle_dflash(root / "dflash", oracle, gamma=GAMMA)
    make_oracle_eagle3(root / "eagle3", oracle, known_tokens(oracle, 0.6))
    return root / "target", root / "dspark"


@pytest.fixture(scope="module")
def plain_texts(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    log = tmp_path_factory.mktemp("stock") / "server.log"
    with serve(models[0], log=log) as server:
        return generate(server, 1)


@pytest.fixture(scope="module")
def headless(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Headless]:
    root = tmp_path_factory.mktemp("server")
    options = ["--dspark-recording", str(root / "recordings")]
    with serve(models[0], *options, drafter=models[1], log=root / "server.log") as server:
        yield Headless(server, root / "recordings")


def test_it_says_that_it_estimates_and_schedules_by_default(headless: Headless) -> None:
    log = headless.server.log.read_text()
    assert "are judged by their own distributions" in log
    assert "step times kept in" in log
    assert headless.server.report()["policy"] == "adaptive"


@pytest.mark.parametrize("policy", ["adaptive", "threshold", "algorithm1", "native", "full", "off"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_greedy_text_equals_no_speculation(
    headless: Headless, plain_texts: list[list[int]], policy: str, concurrency: int
) -> None:
    assert headless.answer(policy, concurrency=concurrency).texts == plain_texts


def test_a_threshold_verifies_far_fewer_tokens_at_the_same_accepted_length(headless: Headless) -> None:
    full, threshold = headless.answer("full"), headless.answer("threshold")
    assert full.verified == full.rounds * (GAMMA + 1)
    assert full.accepted_length > 1.8, "the control: the drafter is of use"
    assert threshold.accepted_length > 0.97 * full.accepted_length
    assert threshold.verified < 0.6 * full.verified


@pytest.mark.parametrize("family", ["dflash", "eagle3"])
def test_the_other_families_do_so_too(
    models: tuple[Path, Path], plain_texts: list[list[int]], tmp_path: Path, family: str
) -> None:
    chosen = [*speculation(models[0].parent / family, family), "--dspark-profile-seconds", "0"]
    with serve(models[0], *chosen, log=tmp_path / "server.log") as server:
        headless = Headless(server, tmp_path)
        full, threshold = headless.answer("full"), headless.answer("threshold")
    assert full.texts == threshold.texts == plain_texts
    assert full.verified == full.rounds * (GAMMA + 1)
    assert full.accepted_length > 1.5, "the control: the drafter is of use"
    assert threshold.accepted_length > 0.97 * full.accepted_length
    assert threshold.verified < 0.7 * full.verified


def test_the_adaptive_policy_does_so_where_tokens_cost(headless: Headless) -> None:
    """On the confidences of the server's own rounds, with costs that do not depend on the machine's load."""
    headless.answer("full")
    policy = AdaptivePolicy(GAMMA, 64, LinearCosts(base=0.01, per_token=0.004, draft=0.002))
    verified, accepted, full_verified, full_accepted = 0, 0, 0, 0
    for outcome in (
        kept.outcome for kept in headless.server.record(headless.recordings).rounds if kept.observed != NEVER
    ):
        if outcome.confidence_RG is None or outcome.plan.reason != "full":
            continue
        plan = policy.plan(outcome.batch)
        lens_R = policy.admit(outcome.batch, plan, outcome.confidence_RG) if plan.drafts else outcome.verify_lens_R * 0
        accepted_R = np.minimum(outcome.accepted_R, np.maximum(lens_R - 1, 0))
        policy.observe(outcome._replace(plan=plan, verify_lens_R=lens_R, accepted_R=accepted_R, steady=False))
        verified, accepted = verified + int(lens_R.sum()), accepted + int(accepted_R.sum())
        full_verified += int(outcome.verify_lens_R.sum())
        full_accepted += int(outcome.accepted_R.sum())
    assert verified < 0.6 * full_verified
    assert accepted > 0.95 * full_accepted > 50


def test_recordings_hold_the_estimates_and_replay_to_the_bit(headless: Headless) -> None:
    headless.answer("threshold")
    recording = headless.server.record(headless.recordings)
    labels = labels_of([recording])
    assert ((labels.confidence_NG > 0) & (labels.confidence_NG < 1)).all()
    found = replay(recording)
    assert found.difference is None
    assert found.admissions > 20


def test_calibrating_works_on_them(headless: Headless) -> None:
    headless.answer("full", concurrency=4)
    generate(headless.server, 4)
    labels = labels_of([headless.server.record(headless.recordings)])
    assert fit_temperatures(labels).gamma == GAMMA


def test_sampled_requests_are_scheduled_too(headless: Headless) -> None:
    before = headless.server.report()
    headless.answer("threshold")
    answer = headless.server.generate(PROMPTS[1], temperature=1.0, max_new_tokens=64, ignore_eos=True)
    assert len(answer["output_ids"]) == 64
    assert headless.server.report()["verified_tokens"] > before["verified_tokens"]
