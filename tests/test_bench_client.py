"""SGLang's load client in its process, against a server in a thread; and a whole `dspark bench` with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspark_serving.bench.client import LoadClient, read_answers
from dspark_serving.bench.workload import Dataset, Load, Shape, client_arguments
from dspark_serving.cli import bench as cli_bench
from dspark_serving.cli.main import app
from dspark_serving.errors import EnvironmentMismatchError
from tests.fake_server import DRAFTED, FakeServer, fake_server
from tests.tiny_models import write_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    write_tokenizer(path)
    return str(path)


@pytest.fixture
def server(model: str) -> Iterator[FakeServer]:
    with fake_server(model) as running:
        yield running


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadClient]:
    with LoadClient(tmp_path_factory.mktemp("logs") / "client.log") as running:
        yield running


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(6)))
    return path


def arguments(server: FakeServer, prompts: Path, client: LoadClient, temperature: float = 0.0) -> list[str]:
    dataset, load, shape = Dataset("mine", prompts), Load(concurrency=2), Shape(5, 7, ignore_eos=True)
    rest = client_arguments(dataset, load, temperature, shape, seed=0, scratch=client.scratch)
    return ["--base-url", server.url, *rest]


def test_sends_every_prompt_in_order_and_reads_the_answers(
    server: FakeServer, prompts: Path, client: LoadClient
) -> None:
    answers = client.run(arguments(server, prompts, client, temperature=1.0))
    asked = [request["messages"][0]["content"] for request in server.requests]
    assert sorted(asked) == [f"question {i}" for i in range(5)]
    assert set(asked[:2]) == {"question 0", "question 1"}
    lengths = Shape(5, 7, ignore_eos=True).lengths(5)
    for request in server.requests:
        number = int(request["messages"][0]["content"].split()[-1])
        assert (request["temperature"], request["ignore_eos"]) == (1.0, True)
        assert request["max_completion_tokens"] == lengths[number]
    assert [(s.text, s.output_tokens, len(s.gaps)) for s in answers.samples] == [("x" * n, n, n - 1) for n in lengths]
    assert all(0 < s.ttft < s.latency < answers.seconds for s in answers.samples)


def test_same_client_runs_again_and_survives_a_failed_run(
    server: FakeServer, prompts: Path, client: LoadClient
) -> None:
    with pytest.raises(EnvironmentMismatchError, match="unrecognized arguments: --no-such-option"):
        client.run(["--no-such-option"])
    server.refuse = "question 2"
    with pytest.raises(EnvironmentMismatchError, match=r"1 of 5 requests failed: .*out of memory"):
        client.run(arguments(server, prompts, client))
    server.refuse = None
    assert len(client.run(arguments(server, prompts, client)).samples) == 5


@pytest.mark.parametrize(
    ("ttfts", "errors", "complaint"),
    [
        ([0.1, 0.0], ["", ""], "has no text"),
        ([0.1, 0.1], ["", "x\nTimeoutError: late"], "1 of 2 .* TimeoutError: late"),
    ],
)
def test_answers_without_times_are_no_figures(ttfts: list[float], errors: list[str], complaint: str) -> None:
    result = {"generated_texts": ["a", ""], "output_lens": [1, 1], "ttfts": ttfts, "itls": [[], []], "errors": errors}
    with pytest.raises(EnvironmentMismatchError, match=complaint):
        read_answers(result | {"duration": 1.0})


def test_dspark_bench_from_command_to_verdict(
    server: FakeServer, prompts: Path, client: LoadClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bench, "LoadClient", lambda log: nullcontext(client))  # its import takes 10 s of CPU
    output = tmp_path / "ab.json"
    command = ["bench", "--url", server.url, "--arm", "off=policy:off", "--arm", "full=policy:full"]
    command += ["--arm", "slow=policy:slow", "--dataset", f"mine={prompts}", "--concurrency", "2", "--prompts", "4"]
    command += ["--max-tokens", "9", "--repetitions", "2", "--candidate", "slow", "--output", str(output)]
    result = CliRunner().invoke(app, [*command, "--ttft-ms", "1000"])
    assert result.exit_code == 0, result.output
    assert "slow against the best of off, full" in result.output
    content = json.loads(output.read_text())
    summaries = {row["arm"]: row for row in content["rows"] if row.get("repetition", 0) is None}
    assert summaries["full"]["accepted_length"] == DRAFTED
    assert summaries["full"]["verified_tokens_per_round"] == 6.0
    assert summaries["full"]["equal_to_off"] == summaries["full"]["goodput"] == 1.0
    assert summaries["full"]["ratio_to_off"] > 1.2
    assert summaries["slow"]["ratio_to_best_other"] < 0.5
    assert "Below 0.97 at 1 of 1 points" in content["notes"]
    assert output.with_suffix(".md").exists()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not output.with_suffix(".runs.jsonl").exists(), "a complete sweep leaves no file to resume from"
