"""The plugin on a real server: a tiny random Qwen3 in fp32, whose greedy text must not depend on speculation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.server import Server, serve
from tests.tiny_models import make_tiny_drafter, make_tiny_target

pytestmark = pytest.mark.real_server

PROMPTS = [[5, 6, 7, 8], list(range(40, 110)), [200] * 9, [17, 300, 4, 99, 260, 31]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    config = make_tiny_target(root / "target")
    make_tiny_drafter(root / "drafter", config, draft_vocab=list(range(20, 480)))
    return root / "target", root / "drafter"


def texts(server: Server, *, concurrency: int) -> list[list[int]]:
    with ThreadPoolExecutor(concurrency) as pool:
        answers = pool.map(lambda prompt: server.generate(prompt, max_new_tokens=48), PROMPTS)
    return [answer["output_ids"] for answer in answers]


@pytest.fixture(scope="module")
def stock(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    log = tmp_path_factory.mktemp("stock") / "server.log"
    with serve(models[0], "--dspark-disable", drafter=models[1], log=log) as server:
        assert server.report() == {"active": False}
        return texts(server, concurrency=1)


@pytest.fixture(
    scope="module", params=[("full",), ("threshold", "--dspark-threshold", "0.2"), ("off",)], ids=lambda p: p[0]
)
def speculative(
    request: pytest.FixtureRequest, models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Server]]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with serve(models[0], "--dspark-policy", *request.param, drafter=models[1], log=log) as server:
        yield request.param[0], server


@pytest.mark.parametrize("concurrency", [1, 4])
def test_greedy_text_equals_stock(speculative: tuple[str, Server], stock: list[list[int]], concurrency: int) -> None:
    assert texts(speculative[1], concurrency=concurrency) == stock


def test_reports_that_it_is_active(speculative: tuple[str, Server]) -> None:
    policy, server = speculative
    server.generate(PROMPTS[0])
    report = server.report()
    assert (report["active"], report["policy"]) == (True, policy)
    assert {"propose", "plan", "verify", "accept", "commit", "round"} <= set(report["phase_seconds"])
    assert "is active and serves DSPARK" in server.log.read_text()
    if policy == "off":
        assert report["accepted_length"] == 1.0


def test_samples_with_temperature(speculative: tuple[str, Server]) -> None:
    answer = speculative[1].generate(PROMPTS[1], temperature=1.0, top_p=0.9, top_k=20, max_new_tokens=24)
    assert len(answer["output_ids"]) == 24
