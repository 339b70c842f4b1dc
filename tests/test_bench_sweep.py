"""Sweeps with a load client that is made up: order, policies, servers, interruption and resumption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dspark_serving.bench import arms as bench_arms
from dspark_serving.bench.arms import Arm, Attached, Launched, PolicyChoice, parse_arm
from dspark_serving.bench.plan import Settings, all_runs, turns
from dspark_serving.bench.runs import RunFile
from dspark_serving.bench.server_api import set_policy
from dspark_serving.bench.sweep import Events, Sweep
from dspark_serving.bench.workload import Dataset, Load, Shape, client_arguments
from dspark_serving.cli import bench as cli_bench
from dspark_serving.cli.main import app
from dspark_serving.errors import DataError, EnvironmentMismatchError, OptionError
from dspark_serving.server import Server
from tests.bench_runs import StandInClient, one_by_one, policy_arms, settings_of
from tests.fake_server import FakeServer, fake_server

QUIET = Events(step=lambda _: None, run=lambda _: None)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as running:
        yield running


def sweep(settings: Settings, client: StandInClient, path: Path) -> RunFile:
    file = RunFile(path / "sweep.runs.jsonl", settings)
    Sweep(settings, client, file, QUIET, path).measure()
    return file


def test_arms_take_turns_and_every_run_is_made_once() -> None:
    settings = settings_of(
        *policy_arms("http://a", "off", "full", "slow"),
        Arm("ngram", Attached("http://b"), greedy_only=True),
        temperatures=(0.0, 1.0),
        loads=(Load(concurrency=1), Load(concurrency=8), Load(concurrency=32)),
        repetitions=2,
        together=True,
    )
    runs = all_runs(settings)
    assert len(runs) == len(set(runs)) == 2 * 3 * (4 + 3)
    assert all(key.point.temperature == 0 for key in runs if key.arm == "ngram")
    made = list(turns(settings, list(settings.arms)))
    assert all(len({(key.point, key.repetition) for key in turn}) == 1 for turn in made)
    greedy = [turn[0].arm for turn in made if turn[0].point.temperature == 0]
    assert set(greedy) == {"off", "full", "slow", "ngram"}
    assert [key.repetition for key in runs] == sorted(key.repetition for key in runs)


def test_all_arms_get_the_same_requests_on_an_empty_cache_under_their_policy(
    server: FakeServer, tmp_path: Path
) -> None:
    policies = []
    client = StandInClient(tmp_path, lambda _: policies.append(server.policy))
    file = sweep(settings_of(*policy_arms(server.url, "off", "full", "slow")), client, tmp_path)
    warm_ups = 3
    assert policies[:warm_ups] == ["off", "full", "slow"]
    assert policies[warm_ups:] == [run.key.arm for run in file.runs]
    assert len({tuple(call) for call in client.calls[warm_ups:]}) == 1
    assert server.log[-2:] == ["/flush_cache", "/dspark/policy"]
    assert server.log.count("/flush_cache") == len(file.runs)


def test_a_policy_that_the_server_does_not_take_is_an_error(server: FakeServer) -> None:
    with pytest.raises(EnvironmentMismatchError, match="there is no policy adaptive"):
        set_policy(server.url, PolicyChoice("adaptive"))
    server.plugin = False
    with pytest.raises(EnvironmentMismatchError, match="has the policy None after it was set to 'full'"):
        set_policy(server.url, PolicyChoice("full"))


@pytest.mark.parametrize(("together", "most"), [(False, 1), (True, 2)])
def test_launched_servers_are_up_one_at_a_time_unless_together(
    together: bool, most: int, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up: list[tuple[str, ...]] = []
    seen = []

    @contextmanager
    def running(model: Path, options: tuple[str, ...], *, log: Path) -> Iterator[Server]:
        up.append(options)
        yield Server(server.url, log)
        up.remove(options)

    monkeypatch.setattr(bench_arms, "running_server", running)
    hosts = [Launched(Path("model"), (name,)) for name in ("--a", "--b")]
    arms = [Arm("off", hosts[0]), Arm("also", hosts[0]), Arm("other", hosts[1])]
    client = StandInClient(tmp_path, lambda _: seen.append(len(up)))
    assert len(sweep(settings_of(*arms, together=together), client, tmp_path).runs) == 6
    assert max(seen) == most
    assert up == []


def test_an_interrupted_sweep_goes_on_where_it_was(server: FakeServer, tmp_path: Path) -> None:
    settings = settings_of(*policy_arms(server.url, "off", "full"))
    fifth = iter([None] * 5)

    def fail_later(_: list[str]) -> None:
        if next(fifth, "now") == "now":
            raise EnvironmentMismatchError("the server died", expected="it to live", fix="See its log.")

    with pytest.raises(EnvironmentMismatchError, match="the server died"):
        sweep(settings, StandInClient(tmp_path, fail_later), tmp_path)
    with (tmp_path / "sweep.runs.jsonl").open("a") as file:
        file.write('{"key": [["gsm8k", 0.0')  # killed while it wrote
    again = StandInClient(tmp_path)
    resumed = sweep(settings, again, tmp_path)
    assert [run.key for run in resumed.runs] == all_runs(settings)
    warm_ups = 2
    assert len(again.calls) == warm_ups + 1
    more = sweep(settings_of(*settings.arms, repetitions=3), StandInClient(tmp_path), tmp_path)
    assert len(more.runs) == 6, "further repetitions are added to those made"


def test_runs_survive_the_file(tmp_path: Path) -> None:
    settings = settings_of(*policy_arms("http://a", "off", "full"))
    run = one_by_one("off", [0.1, 1 / 3], text='a "text"\nwith é')
    RunFile(tmp_path / "runs", settings).add(run)
    assert RunFile(tmp_path / "runs", settings).runs == [run]


@pytest.mark.parametrize(
    ("content", "complaint"), [("{}\n", "other settings"), ("no JSON\n", "damaged"), ("", "damaged")]
)
def test_runs_of_other_settings_are_not_mixed_in(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    path.write_text(content)
    with pytest.raises(DataError, match=complaint):
        RunFile(path, settings_of(*policy_arms("http://a", "off", "full")))
    assert path.read_text() == content


def test_time_limit_ends_the_sweep_between_turns(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def a_second_passes(_: list[str]) -> None:
        clock[0] += 1.0

    arms = policy_arms(server.url, "off", "full")
    settings = settings_of(*arms, loads=(Load(concurrency=1), Load(concurrency=2)), time_limit=4.5)
    file = sweep(settings, StandInClient(tmp_path, a_second_passes), tmp_path)
    # Two warm-ups, then two turns of two runs: the second begins in time and is made whole.
    assert [run.key for run in file.runs] == all_runs(settings)[:4]


def test_ctrl_c_leaves_a_valid_result(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    countdown = iter([None] * 4)

    def interrupt(_: list[str]) -> None:
        if next(countdown, "now") == "now":
            raise KeyboardInterrupt

    client = StandInClient(tmp_path, interrupt)
    monkeypatch.setattr(cli_bench, "LoadClient", lambda log: nullcontext(client))
    output = tmp_path / "ab.json"
    with pytest.raises(KeyboardInterrupt):
        cli_bench.measure("ab", settings_of(*policy_arms(server.url, "off", "full")), output)
    content = json.loads(output.read_text())
    assert "CUT SHORT: 2 of 4 runs are missing" in content["notes"]
    assert [row["repetition"] for row in content["rows"] if "repetition" in row] == [0, 0, None, None]
    assert output.with_suffix(".runs.jsonl").exists()


def test_arms_of_the_command_line() -> None:
    shared, model = Attached("http://a"), Path("model")
    assert parse_arm("off=policy:off", shared, None) == Arm("off", shared, PolicyChoice("off"))
    assert parse_arm("t=policy:threshold:0.5", shared, None).policy == PolicyChoice("threshold", 0.5)
    assert parse_arm("b=url:http://b:1/", None, None) == Arm("b", Attached("http://b:1"))
    launched = parse_arm("s=server:--tp 2 --x 'a b'", None, model)
    assert launched.host == Launched(model, ("--tp", "2", "--x", "a b"))


@pytest.mark.parametrize("text", ["off", "off=", "=policy:off", "off=polizei:off", "t=policy:threshold:high"])
def test_malformed_arms_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="NAME=policy:POLICY"):
        parse_arm(text, Attached("http://a"), None)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [('{"prompt": "a"}\n', "has 1 prompts"), ("{}\n{}\n", "no file of prompts"), ("?\n", "no file of prompts")],
)
def test_unusable_prompt_files_are_refused(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=complaint):
        client_arguments(Dataset("d", path), Load(2), 0.0, Shape(2, 8, True), seed=0, scratch=tmp_path)


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_a_run_has_no_fewer_requests_than_its_concurrency(tmp_path: Path) -> None:
    def asked(load: Load) -> list[str]:
        return client_arguments(Dataset("random"), load, 0.0, Shape(4, 8, True), seed=0, scratch=tmp_path)

    assert [option(asked(Load(c)), "--num-prompts") for c in (1, 32)] == ["4", "32"]
    at_a_rate = asked(Load(request_rate=0.5))
    assert option(at_a_rate, "--request-rate") == "0.5"
    assert "--max-concurrency" not in at_a_rate


def test_several_waves_of_requests_as_far_as_the_prompts_go(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(10)))
    shape = Shape(4, 8, True, waves=3)

    def requests(dataset: Dataset, concurrency: int) -> str:
        asked = client_arguments(dataset, Load(concurrency), 0.0, shape, seed=0, scratch=tmp_path)
        return option(asked, "--num-prompts")

    assert [requests(Dataset("mine", path), c) for c in (1, 2, 5, 10)] == ["4", "6", "10", "10"]
    assert requests(Dataset("random"), 10) == "30", "the client makes as many prompts as are asked for"
    with pytest.raises(DataError, match="has 10 prompts"):
        requests(Dataset("mine", path), 11)


def test_answers_differ_in_length_evenly_and_for_all_arms_alike() -> None:
    shape = Shape(4, 40, True)
    for requests in (8, 32, 100):
        lengths = shape.lengths(requests)
        assert lengths == shape.lengths(requests)
        assert (min(lengths) >= 20, max(lengths) <= 60) == (True, True)
        assert sum(lengths) / requests == pytest.approx(40, rel=0.06)
        assert len(set(lengths)) > min(requests, 40) / 2, "they do not end in step"
    assert min(Shape(1, 1, True).lengths(20)) == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"--concurrency": None}, "either --concurrency or --request-rate"),
        ({"--concurrency": "1,1.5"}, "whole numbers"),
        ({"--concurrency": "2,2"}, "named twice"),
        ({"--concurrency": None, "--request-rate": "0"}, "above 0"),
        ({"--temperature": "-1"}, "at least 0"),
        ({"--candidate": "nobody"}, "there is no arm 'nobody'"),
        ({"--url": None}, "has no server"),
        ({"--server": "--tp 1"}, "both given"),
    ],
)
def test_unusable_options_are_refused_in_one_line(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    options = {"--url": "http://a", "--concurrency": "1", "--dataset": "random", "--output": str(tmp_path / "x.json")}
    given = [word for name, value in (options | changes).items() if value is not None for word in (name, value)]
    result = CliRunner().invoke(app, ["bench", "--arm", "off=policy:off", "--arm", "full=policy:full", *given])
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []
