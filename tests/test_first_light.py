"""The benchmark's own arithmetic, its schedule and its files; no server is launched."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import first_light, load
from benchmarks.first_light import Arm, Settings, phase_rows, rows_of, schedule
from benchmarks.load import DATASETS, Sample, read_prompts
from benchmarks.report import markdown, plot_throughput
from benchmarks.results import ResultFile
from benchmarks.summary import (
    Context,
    Run,
    accepted_length,
    ratio_of_throughputs,
    time_shares,
    verified_tokens_per_round,
)
from dspark_serving.errors import DataError
from dspark_serving.metrics import WINDOW

# ../shared/notes/results.md
RESULT_KEYS = {
    "arm", "target", "drafter", "family", "dataset", "temperature", "concurrency", "repetition", "requests",
    "output_tokens", "seconds", "tokens_per_second", "tokens_per_second_per_user", "accepted_length",
    "verified_tokens_per_round", "ttft_p50", "tpot_p50", "itl_p95", "equal_to_off",
}  # fmt: skip
CONTEXTS = {
    "off": Context("a target", None, None, 0.0),
    "dspark": Context("a target", "a drafter", "dspark", 0.0),
    "ngram": Context("a target", None, "ngram", 0.0),
}


def sample(
    prompt: int = 0,
    *,
    start: float = 0.0,
    seconds: float = 1.0,
    tokens: int = 10,
    text: str = "text",
    rounds: int | None = None,
    verified: float | None = None,
) -> Sample:
    arrivals = tuple(np.linspace(start + 0.1 * seconds, start + seconds, 4))
    return Sample(prompt, text, tokens, start, arrivals, start + seconds, rounds, verified)


def one_by_one(arm: str, seconds: list[float], *, repetition: int = 0, text: str = "text") -> Run:
    """A run at concurrency 1, ten tokens an answer."""
    starts = np.cumsum([0.0, *seconds[:-1]])
    answers = [sample(i, start=a, seconds=s, text=text) for i, (a, s) in enumerate(zip(starts, seconds, strict=True))]
    return Run(arm, "gsm8k", 1, repetition, tuple(answers))


def test_accepted_length_counts_the_bonus_token_and_not_the_prefill() -> None:
    # One token of the prefill, then rounds of 3 + 1 + 2 tokens: seven tokens, three rounds.
    assert accepted_length([sample(tokens=7, rounds=3)]) == 2.0
    # Pooled over rounds, not averaged over requests.
    assert accepted_length([sample(tokens=7, rounds=3), sample(tokens=2, rounds=1)]) == 7 / 4
    assert accepted_length([sample(tokens=7)]) is None
    assert accepted_length([sample(tokens=1, rounds=0)]) is None


def test_verified_tokens_are_a_mean_over_rounds() -> None:
    samples = [sample(rounds=3, verified=18.0), sample(rounds=1, verified=2.0)]
    assert verified_tokens_per_round(samples) == 5.0
    assert verified_tokens_per_round([sample()]) is None


def test_time_shares_add_up_to_the_time_of_the_run() -> None:
    overlapping = [sample(0, start=0, seconds=4), sample(1, start=1, seconds=1), sample(2, start=2, seconds=6)]
    assert time_shares(overlapping) == pytest.approx([1 + 0.5 + 1, 0.5, 1 + 4])
    assert time_shares([sample(0, start=5, seconds=3)]) == [3.0]


def test_ratio_of_a_constant_gain_is_certain() -> None:
    seconds = [1.0, 5.0, 2.0, 9.0]
    ratio = ratio_of_throughputs([one_by_one("dspark", [s / 1.5 for s in seconds])], [one_by_one("off", seconds)])
    assert ratio == pytest.approx((1.5, 1.5, 1.5))


def test_ratio_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(100):
        off, gains = rng.uniform(1, 3, 40), rng.uniform(1.2, 2.2, 40)
        ratio = ratio_of_throughputs([one_by_one("dspark", list(off / gains))], [one_by_one("off", list(off))])
        truth = 1.0 / np.mean(1.0 / np.linspace(1.2, 2.2, 100_001))  # total time by total time, over all prompts
        covered.append(ratio.low <= truth <= ratio.high)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_rows_have_the_agreed_keys_and_summaries_compare_with_off() -> None:
    runs = [
        one_by_one(arm, [2.0 / gain, 4.0 / gain], repetition=repetition, text=text)
        for repetition in (0, 1)
        for arm, gain, text in (("off", 1.0, "same"), ("dspark", 2.0, "same"), ("ngram", 0.5, f"not {repetition}"))
    ]
    rows = rows_of(CONTEXTS, runs)
    assert all(set(row) >= RESULT_KEYS for row in rows)
    assert [row["repetition"] for row in rows] == [0, 0, 0, 1, 1, 1, None, None, None]
    summaries = {row["arm"]: row for row in rows if row["repetition"] is None}
    assert {arm: row["family"] for arm, row in summaries.items()} == {"off": None, "dspark": "dspark", "ngram": "ngram"}
    assert "ratio_to_off" not in summaries["off"]
    assert {arm: summaries[arm]["ratio_to_off"] for arm in ("dspark", "ngram")} == pytest.approx(
        {"dspark": 2.0, "ngram": 0.5}
    )
    assert {arm: row["equal_to_off"] for arm, row in summaries.items()} == {"off": 1.0, "dspark": 1.0, "ngram": 0.0}
    assert (summaries["dspark"]["output_tokens"], summaries["dspark"]["seconds"]) == (40, 6.0)
    assert summaries["dspark"]["tokens_per_second"] == pytest.approx(40 / 6)
    json.dumps(rows)  # no numpy scalars


def test_arms_take_turns_and_every_run_is_made_once() -> None:
    settings = Settings(arms=("off", "dspark", "ngram"), concurrencies=(1, 8), repetitions=3, prompts=2, max_tokens=8)
    points = list(schedule(settings))
    assert len(points) == len(set(points)) == 3 * 2 * 3 * len(DATASETS)
    turns = [points[i : i + 3] for i in range(0, len(points), 3)]
    assert all(len({point._replace(arm="") for point in turn}) == 1 for turn in turns)
    firsts = [turn[0].arm for turn in turns]
    assert {arm: firsts.count(arm) for arm in settings.arms} == dict.fromkeys(settings.arms, len(turns) // 3)


def test_phases_are_left_out_when_the_window_saw_other_rounds() -> None:
    after = {"rounds": WINDOW + 10, "phase_seconds": {"propose": 0.25}}
    expected = {"arm": "dspark", "concurrency": 4, "rounds": WINDOW, "phase": "propose", "seconds": 0.25}
    assert phase_rows("dspark", 4, {"rounds": 10}, after) == [expected]
    assert phase_rows("dspark", 4, {"rounds": 11}, after) == []
    assert phase_rows("off", 4, {"active": False}, {"active": False}) == []


def test_prompts_are_the_first_of_their_file() -> None:
    assert all(read_prompts(dataset, 5)[:2] == read_prompts(dataset, 2) for dataset in DATASETS)
    with pytest.raises(DataError, match="has 40 prompts"):
        read_prompts("chat", 41)


def chunk(**fields: Any) -> str:
    whole = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [], **fields}
    return f"data: {json.dumps(whole)}\n\n"


def streamed(text: str, tokens: int, details: dict[str, Any] | None) -> str:
    """An answer as SGLang streams it: role, pieces, usage, and its own extension."""
    deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in text)]
    pieces = [chunk(choices=[{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]
    usage = chunk(usage={"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1})
    return "".join([*pieces, *([chunk(sglext={"spec_tokens_details": details})] if details else []), usage]) + (
        "data: [DONE]\n\n"
    )


class StandIn:
    """Answers instead of a server, and remembers what it was asked."""

    def __init__(self, details: dict[str, Any] | None) -> None:
        self._details = details
        self._waiting = 0
        self.most_waiting = 0
        self.requests: list[dict[str, Any]] = []

    async def answer(self, request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        self.requests.append(asked)
        self._waiting += 1
        self.most_waiting = max(self.most_waiting, self._waiting)
        await asyncio.sleep(0.05)  # time for every user to have a request under way
        self._waiting -= 1
        text = streamed(f"re:{asked['messages'][0]['content']}", 9, self._details)
        return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


SPECULATED = {"spec_verify_ct": 4, "spec_cap_length": 2.5, "spec_num_proposed_drafts": 20}


@pytest.mark.parametrize(
    ("details", "rounds", "verified"),
    [(None, None, None), (SPECULATED, 4, 10.0), (SPECULATED | {"spec_cap_length": 0.0}, 4, 24.0)],
    ids=["plain", "trimmed", "full"],
)
def test_client_reads_what_sglang_streams(
    monkeypatch: pytest.MonkeyPatch, details: dict[str, Any] | None, rounds: int | None, verified: float | None
) -> None:
    server = StandIn(details)
    transport = httpx.MockTransport(server.answer)
    monkeypatch.setattr(
        httpx.AsyncHTTPTransport, "handle_async_request", lambda _, request: transport.handle_async_request(request)
    )
    samples = load.run_load("http://server", ["a", "b", "c"], concurrency=2, max_tokens=9)
    assert [(s.prompt, s.text, s.output_tokens) for s in samples] == [(0, "re:a", 9), (1, "re:b", 9), (2, "re:c", 9)]
    assert all((s.rounds, s.verified_tokens) == (rounds, verified) for s in samples)
    assert all(len(s.arrivals) == len("re:a") and s.start < s.arrivals[0] <= s.end for s in samples)
    assert sorted(request["messages"][0]["content"] for request in server.requests) == ["a", "b", "c"]
    assert all((request["temperature"], request["max_tokens"]) == (0, 9) for request in server.requests)
    assert server.most_waiting == 2


def test_result_file_names_command_commit_and_machine(tmp_path: Path) -> None:
    path = tmp_path / "results" / "figures.json"
    ResultFile("figures", path).write([{"arm": "off"}], "a note")
    content = json.loads(path.read_text())
    assert set(content) == {"name", "created", "command", "git", "seconds", "environment", "rows", "notes"}
    assert set(content["environment"]) == {"cpu", "cores", "gpu", "python", "torch", "sglang", "plugin"}
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", content["git"])
    assert content["rows"] == [{"arm": "off"}]
    assert [file.name for file in path.parent.iterdir()] == ["figures.json"]


def test_table_and_plot_show_every_summary(tmp_path: Path) -> None:
    runs = [one_by_one("off", [2.0, 4.0]), one_by_one("dspark", [1.0, 2.0])]
    phases = phase_rows(
        "dspark", 1, {"rounds": 0}, {"rounds": WINDOW, "phase_seconds": {"propose": 0.0123, "verify": 0.0456}}
    )
    rows = rows_of(CONTEXTS, runs) + phases
    text = markdown("Figures", rows, "a note")
    assert "| gsm8k | 1 | off | 3.3 | 3.8 | - |" in text
    assert "| gsm8k | 1 | dspark | 6.7 | 7.5 | 2.00 (2.00-2.00) |" in text
    assert "| dspark | 1 | 12.3 | 45.6 |" in text
    plot_throughput(rows, tmp_path / "figures.png")
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--arms", "dspark,ngram"], "expected off among them"),
        (["--arms", "off,dspork"], "names 'dspork'"),
        (["--concurrency", "1,many"], "names 'many'"),
        (["--dtype", "fp8"], "names 'fp8'"),
    ],
)
def test_unusable_options_are_refused_in_one_line(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {name: Arm(()) for name in ("off", "plain", "dspark", "ngram")}
    monkeypatch.setattr(first_light, "arms_of", lambda drafter: arms)
    monkeypatch.setattr(first_light, "shipped_bundle", lambda: Path("drafter"))
    app = Typer()
    app.command()(first_light.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert "Traceback" not in result.output
