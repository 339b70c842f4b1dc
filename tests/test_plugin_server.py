"""The plugin on a real server: a tiny random Qwen3 in fp32, whose greedy text must not depend on speculation.

One server serves all policies: they are switched while it runs, between requests and in the middle of them.
"""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from dspark_serving.config import POLICIES
from dspark_serving.recording import replay
from tests.server import Server, serve
from tests.tiny_models import make_tiny_drafter, make_tiny_target

pytestmark = pytest.mark.real_server

PROMPTS = [[5, 6, 7, 8], list(range(40, 110)), [200] * 9, [17, 300, 4, 99, 260, 31]]


class Speculative(NamedTuple):
    server: Server
    recordings: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    config = make_tiny_target(root / "target")
    make_tiny_drafter(root / "drafter", config, draft_vocab=list(range(20, 480)))
    return root / "target", root / "drafter"


def texts(server: Server, *, concurrency: int, copies: int = 1) -> list[list[int]]:
    with ThreadPoolExecutor(concurrency) as pool:
        answers = pool.map(lambda prompt: server.generate(prompt, max_new_tokens=48), PROMPTS * copies)
    return [answer["output_ids"] for answer in answers]


@pytest.fixture(scope="module")
def stock(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    log = tmp_path_factory.mktemp("stock") / "server.log"
    with serve(models[0], "--dspark-disable", drafter=models[1], log=log) as server:
        assert server.report() == {"active": False}
        assert httpx.post(f"{server.base_url}/dspark/policy", json={"policy": "off"}).status_code == 404
        return texts(server, concurrency=1)


@pytest.fixture(scope="module")
def speculative(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Speculative]:
    root = tmp_path_factory.mktemp("server")
    options = ["--dspark-recording", str(root / "recordings"), "--enable-metrics"]
    with serve(models[0], *options, drafter=models[1], log=root / "server.log") as server:
        yield Speculative(server, root / "recordings")


def test_measures_its_rounds_before_it_serves_and_schedules_by_default(speculative: Speculative) -> None:
    log = speculative.server.log.read_text()
    assert "is active and serves DSPARK" in log
    assert "step times kept in" in log
    speculative.server.generate(PROMPTS[0], max_new_tokens=128)
    report = speculative.server.report()
    assert (report["active"], report["policy"]) == (True, "adaptive")
    # A random drafter is never right: it is tried, and then left aside.
    assert report["plans"]["off"] > report["plans"]["warm-up"] > 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_greedy_text_equals_stock(
    speculative: Speculative, stock: list[list[int]], policy: str, concurrency: int
) -> None:
    speculative.server.use(policy, **({"threshold": 0.2} if policy == "threshold" else {}))
    before = speculative.server.report()
    assert texts(speculative.server, concurrency=concurrency) == stock
    report = speculative.server.report()
    assert report["policy"] == policy
    rows = report["verified_tokens"] - before["verified_tokens"]
    rounds = report["request_rounds"] - before["request_rounds"]
    if policy == "off":
        assert rows == rounds == report["output_tokens"] - before["output_tokens"]
    if policy == "full":
        assert rows > 3 * rounds
        assert {"propose", "plan", "verify", "accept", "commit", "round"} <= set(report["phase_seconds"])


def test_greedy_text_survives_switching_in_the_middle_of_requests(
    speculative: Speculative, stock: list[list[int]]
) -> None:
    done = threading.Event()

    def switch() -> None:
        for policy in itertools.cycle(POLICIES):
            if done.wait(0.05):
                return
            speculative.server.use(policy)

    before = speculative.server.report()["plans"]
    switcher = threading.Thread(target=switch)
    switcher.start()
    try:
        assert texts(speculative.server, concurrency=4, copies=3) == stock * 3
    finally:
        done.set()
        switcher.join()
    plans = speculative.server.report()["plans"]
    assert "cost_known" in speculative.server.report()["scheduler"]
    assert all(plans[name] > before.get(name, 0) for name in ("full", "off", "threshold", "native"))


@pytest.mark.parametrize("body", [{"policy": "best"}, {"policy": "threshold", "threshold": 2}, {}])
def test_an_unknown_policy_is_refused(speculative: Speculative, body: dict[str, object]) -> None:
    url = f"{speculative.server.base_url}/dspark/policy"
    assert httpx.post(url, json=body, timeout=60.0, trust_env=False).status_code in (400, 422)
    assert len(speculative.server.generate(PROMPTS[0])["output_ids"]) == 32


@pytest.mark.parametrize("policy", ["adaptive", "full", "off"])
def test_samples_with_temperature(speculative: Speculative, policy: str) -> None:
    speculative.server.use(policy)
    answer = speculative.server.generate(PROMPTS[1], temperature=1.0, top_p=0.9, top_k=20, max_new_tokens=24)
    assert len(answer["output_ids"]) == 24


def test_an_impossible_floor_does_not_stop_the_server(speculative: Speculative, stock: list[list[int]]) -> None:
    speculative.server.use("adaptive")
    wish = {"dspark": {"min_tokens_per_second": 1e9, "weight": 3.0}}
    answer = speculative.server.generate(PROMPTS[1], max_new_tokens=48, custom_params=wish)
    assert answer["output_ids"] == stock[1]


def metrics(server: Server) -> dict[str, float]:
    """Values by name, summed over labels."""
    found: dict[str, float] = {}
    shown = httpx.get(f"{server.base_url}/metrics", timeout=60.0, trust_env=False).text
    for line in shown.splitlines():
        if line.startswith("dspark_"):
            name, value = line.split("{")[0].split(" ")[0], float(line.rsplit(" ", 1)[1])
            found[name] = found.get(name, 0.0) + value
    return found


def test_metrics_show_plans_and_times(speculative: Speculative) -> None:
    speculative.server.use("full")
    before, told = metrics(speculative.server), speculative.server.report()
    speculative.server.generate(PROMPTS[0])
    after, report = metrics(speculative.server), speculative.server.report()
    assert after["dspark_plugin_active"] == 1.0
    rounds = report["rounds"] - told["rounds"]
    assert rounds > 0
    assert after["dspark_rounds_total"] - before["dspark_rounds_total"] == rounds
    assert after["dspark_tier_tokens"] == 5  # of the last round: an anchor and four drafts
    assert {"dspark_step_seconds", "dspark_round_tokens", "dspark_phase_seconds"} <= after.keys()
    verified = report["verified_tokens"] - told["verified_tokens"]
    assert after["dspark_verified_tokens_total"] - before["dspark_verified_tokens_total"] == verified > rounds
    assert after["dspark_padding_tokens_total"] == before["dspark_padding_tokens_total"]  # no graphs, no padding


def test_a_recording_of_the_server_replays_to_the_bit(speculative: Speculative) -> None:
    speculative.server.use("adaptive")
    texts(speculative.server, concurrency=4, copies=3)
    found = replay(speculative.server.record(speculative.recordings))
    assert found.plans > 100
    assert found.difference is None


def test_a_recording_that_cannot_be_written_is_refused_and_the_server_goes_on(
    speculative: Speculative, stock: list[list[int]]
) -> None:
    shutil.rmtree(speculative.recordings)
    speculative.recordings.touch()
    answer = httpx.post(f"{speculative.server.base_url}/dspark/recording", timeout=60.0, trust_env=False)
    speculative.recordings.unlink()
    assert answer.status_code == 409
    assert "nothing can be recorded now" in speculative.server.log.read_text()
    assert texts(speculative.server, concurrency=1) == stock
