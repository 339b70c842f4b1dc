"""`dspark demo` with stand-ins for its two servers: what is launched, compared and shown, and when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspark_serving import demo
from dspark_serving.cli.main import app
from dspark_serving.server import Answer


class StandIn:
    """Answers as fast as it is told; says rounds where it speculates."""

    def __init__(self, options: list[str], spoils: str | None) -> None:
        self.plain = "--dspark-disable" in options
        self.spoils = None if self.plain else spoils

    def chat(self, prompt: str, *, max_tokens: int) -> Answer:
        text = "another text" if prompt == self.spoils else f"answer to {prompt}"
        return Answer(text, 101, 10.0 if self.plain else 4.0, None if self.plain else 40)


class Launches:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.options: list[list[str]] = []
        self.spoils: str | None = None
        self.speculates = True
        monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
        monkeypatch.setattr(demo, "ensure_smollm2", lambda dtype, report: tmp_path / dtype)
        monkeypatch.setattr(demo, "running_server", self._running)

    @contextmanager
    def _running(self, target: Path, options: list[str], *, log: Path) -> Iterator[StandIn]:
        self.options.append(options)
        yield StandIn(options if self.speculates else ["--dspark-disable"], self.spoils)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launches:
    return Launches(monkeypatch, tmp_path)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["demo", *arguments])
    return result.exit_code, result.output


def test_compares_the_shipped_drafter_with_the_same_server_without_it(launches: Launches) -> None:
    code, shown = run()
    speculating, plain = launches.options
    assert "smollm2-135m-dspark" in speculating[speculating.index("--speculative-draft-model-path") + 1]
    assert plain == [*speculating, "--dspark-disable"]
    assert code == 0
    assert "3 of 3" in shown
    assert "2.50 times the speed" in shown
    assert "2.50" in shown  # 100 tokens behind the prefill's in 40 rounds


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", 1), ("bf16", 0)])
def test_another_text_fails_it_in_fp32_only(launches: Launches, dtype: str, expected: int) -> None:
    launches.spoils = demo.PROMPTS[1]
    code, shown = run("--dtype", dtype)
    assert code == expected
    assert "2 of 3" in shown


def test_a_server_that_does_not_speculate_is_no_comparison(launches: Launches) -> None:
    launches.speculates = False
    code, shown = run()
    assert code == 2
    assert "answered without speculation" in shown
