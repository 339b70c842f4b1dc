"""`dspark evaluate` from its options to its files, in this process and against a server that makes its answers up."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from dspark_training.evaluation.evaluate import Evaluation
from dspark_training.evaluation.questions import read_questions
from dspark_training.evaluation.records import Record
from dspark_training.evaluation.subjects import Ask, LocalSubject, load_drafter
from dspark_training.target import Target
from typer.testing import CliRunner

from dspark_serving.cli.main import app
from dspark_serving.errors import DataError
from dspark_serving.scheduler.calibration import Calibration
from dspark_serving.scheduler.survival_map import SurvivalMap
from tests.oracle_drafters import known_tokens, make_oracle_drafter, make_oracle_target
from tests.tiny_models import make_tiny_drafter


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, two drafters of which one knows more, and two files of questions."""
    root = tmp_path_factory.mktemp("world")
    oracle = make_oracle_target(root / "target")
    make_oracle_drafter(root / "good", oracle, known_tokens(oracle, 0.9), confidence=True)
    make_oracle_drafter(root / "poor", oracle, known_tokens(oracle, 0.3))
    (root / "one.jsonl").write_text("".join(json.dumps({"turns": [f"Say {i}", "again"]}) + "\n" for i in range(6)))
    (root / "two.jsonl").write_text(json.dumps({"prompt": "What?", "domain": "math"}) + "\n")
    return root


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "300"})
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.output


def rows_of(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())["rows"])


def local(world: Path, work: Path, *arguments: object) -> list[dict[str, Any]]:
    output = work / "out.json"
    data = ("--dataset", f"gsm8k={world}/one.jsonl", "--dataset", f"math500={world}/two.jsonl")
    both = ("--drafter", world / "good", "--drafter", world / "poor")
    code, said = run(
        "--target", world / "target", *both, *data, "--max-tokens", 24, "--dtype", "fp32", "--work", work / "w",
        "--output", output, *arguments,
    )  # fmt: skip
    assert code == 0, said
    return rows_of(output)


def test_two_drafters_side_by_side(world: Path, tmp_path: Path) -> None:
    rows = local(world, tmp_path, "--temperature", "0,1", "--plain", "--turns", 2)
    lengths = {(r["arm"], r["dataset"], r["temperature"]): r for r in rows if "accepted_length" in r}
    datasets = ("gsm8k", "math500", "all math")
    assert {key[1] for key in lengths} == set(datasets)
    for dataset in datasets:
        for temperature in (0.0, 1.0):
            good, poor = (lengths[arm, dataset, temperature] for arm in ("good", "poor"))
            assert good["accepted_length"] > poor["accepted_length"]
            assert lengths["off", dataset, temperature]["accepted_length"] == 1
            assert ("prompt_lookup", dataset, temperature) in lengths
    for row in lengths.values():  # every token but the prefill's was made by a round, and nothing else was
        assert row["accepted_length"] == pytest.approx((row["output_tokens"] - row["requests"]) / row["rounds"])
    assert lengths["good", "gsm8k", 0.0]["equal_to_off"] == 1
    assert lengths["good", "gsm8k", 0.0]["requests"] == 12, "two turns of each question"
    (pair,) = [r for r in rows if "difference" in r and (r["dataset"], r["temperature"]) == ("gsm8k", 0.0)]
    assert (pair["arm"], pair["compared_with"]) == ("good", "poor")
    assert pair["low"] > 0
    assert {r["arm"] for r in rows if "ece" in r} == {"good", "poor"}, "by its head, and by its distributions"
    assert "| gsm8k | 0 | good |" in (tmp_path / "out.md").read_text()
    assert (tmp_path / "out.png").is_file()
    assert (tmp_path / "out_good_t1_reliability.png").is_file()


def test_the_walk_gives_the_rounds_of_real_decoding(world: Path, tmp_path: Path) -> None:
    walked, decoded = local(world, tmp_path / "a", "--walk"), local(world, tmp_path / "b")
    figures = [
        {
            (r["arm"], r["dataset"]): (r["accepted_length"], r["conditional_acceptance"])
            for r in rows
            if "accepted_length" in r and r["arm"] != "off"
        }
        for rows in (walked, decoded)
    ]
    assert figures[0] == figures[1]


def test_an_interrupted_evaluation_goes_on_and_answers_nothing_twice(world: Path, tmp_path: Path) -> None:
    target = Target.load(world / "target")
    loaded = load_drafter(world / "good", target, world / "target")
    datasets = dict([read_questions(f"gsm8k={world}/one.jsonl", 0, turns=2)])
    asked: list[tuple[str, int]] = []

    class Dying(LocalSubject):
        dies = True

        def answer(self, asks: Sequence[Ask], temperature: float, max_tokens: int) -> Iterator[list[Record]]:
            for records in super().answer(asks, temperature, max_tokens):
                asked.extend((r.question, r.turn) for r in records)
                yield records
                if self.dies:
                    raise KeyboardInterrupt

    subject = Dying("good", target, loaded, batch_size=2, seed=0)
    evaluation = Evaluation("tiny", datasets, [1.0], 12, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluation.answers(subject, evaluation.points[0])
    assert len(asked) == 2
    subject.dies = False
    whole = evaluation.answers(subject, evaluation.points[0])
    assert len(whole) == len(asked) == len(set(asked)) == 12
    fresh = Evaluation("tiny", datasets, [1.0], 12, tmp_path / "fresh")
    again = fresh.answers(subject, fresh.points[0])
    assert [r.text for r in again] == [r.text for r in whole]


def test_answers_with_other_weights_or_another_draft_vocabulary_are_refused(world: Path, tmp_path: Path) -> None:
    """A calibration changes no answer; a target in a directory of the same name may be another."""
    drafter, datasets = tmp_path / "drafter", dict([read_questions(f"x={world}/two.jsonl", 0)])
    vocabulary, judge = drafter / "draft_vocab.json", drafter / "survival_map.json"
    make_tiny_drafter(drafter, json.loads((world / "target/config.json").read_text()), draft_vocab=list(range(200)))

    def answered(target_path: Path) -> list[Record]:
        target = Target.load(target_path)
        subject = LocalSubject("tiny", target, load_drafter(drafter, target, target_path), batch_size=2, seed=0)
        evaluation = Evaluation("target", datasets, [0.0], 6, tmp_path / "work")
        return evaluation.answers(subject, evaluation.points[0])

    first, written = answered(world / "target"), vocabulary.read_text()
    Calibration.identity(4).save(drafter / "calibration.json")
    assert answered(world / "target") == first
    vocabulary.write_text(json.dumps({"token_ids": list(range(1, 201))}))
    with pytest.raises(DataError, match=r"other settings \(drafter\)"):
        answered(world / "target")
    vocabulary.write_text(written)
    SurvivalMap.default(4).save(judge)
    with pytest.raises(DataError, match=r"other settings \(drafter\)"):
        answered(world / "target")
    judge.unlink()
    assert answered(world / "target") == first
    make_oracle_target(tmp_path / "target", seed=1)
    with pytest.raises(DataError, match=r"other settings \(target_weights\)"):
        answered(tmp_path / "target")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "no --dataset"),
        (["--dataset", "gsm8k"], "neither --drafter"),
        (["--dataset", "gsm8k", "--url", "http://x", "--drafter", "d"], "both"),
        (["--dataset", "gsm8k", "--target", "t", "--drafter", "d", "--walk", "--temperature", "1"], "--walk"),
        (["--dataset", "nothing", "--target", "t", "--drafter", "d"], "there is no dataset 'nothing'"),
        (["--dataset", "x=a", "--dataset", "x=b", "--target", "t", "--drafter", "d"], "two datasets are called x"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments: list[str], named: str) -> None:
    code, said = run(*arguments)
    assert code == 2
    assert named in said


def test_a_drafter_of_another_target_is_refused(world: Path, tmp_path: Path) -> None:
    oracle = make_oracle_target(tmp_path / "other")
    make_oracle_drafter(tmp_path / "d", oracle, known_tokens(oracle, 0.5))
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"num_target_layers": 9}))
    arguments = ("--target", world / "target", "--dataset", f"x={world}/two.jsonl", "--work", tmp_path)
    code, said = run("--drafter", tmp_path / "d", *arguments)
    assert code == 2
    assert "another target" in said
    (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"draft_vocab_size": 5}))
    code, said = run("--drafter", tmp_path / "d", *arguments)
    assert code == 2
    assert "draft_vocab.json" in said


class _Chat(BaseHTTPRequestHandler):
    """Every answer takes 4 rounds: two with all of 2 drafts kept, two with none."""

    rounds, strangers = 0, 0
    left = 0  # answers before the server fails

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        report = {"rounds": 1, "request_rounds": _Chat.rounds, "output_tokens": 2 * _Chat.rounds}
        self._send({"speculative_num_draft_tokens": 3, "internal_states": [{"dspark": report}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        _Chat.left -= 1
        if _Chat.left < 0:
            self.send_error(500)
            return
        _Chat.rounds += 4 + _Chat.strangers
        details = {"spec_verify_ct": 4, "spec_correct_drafts_histogram": [2, 0, 2]}
        text = body["messages"][-1]["content"].upper()
        message = {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": 9}}
        self._send(message | {"sglext": {"spec_tokens_details": details}})

    def _send(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def chat_server(strangers: int = 0, answers: int = 1000) -> Iterator[str]:
    _Chat.rounds, _Chat.strangers, _Chat.left = 0, strangers, answers
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Chat)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_is_asked_the_same_questions(world: Path, tmp_path: Path) -> None:
    with chat_server() as url:
        arguments = ("--url", url, "--dataset", f"gsm8k={world}/one.jsonl", "--work", tmp_path / "w")
        code, said = run(*arguments, "--output", tmp_path / "o.json", "--turns", 2)
    assert code == 0, said
    (row,) = [r for r in rows_of(tmp_path / "o.json") if "accepted_length" in r]
    assert (row["requests"], row["accepted_length"], row["conditional_acceptance"]) == (12, 2.0, [0.5, 1.0])
    assert row["tokens_per_second"] > 0
    kept = [json.loads(line) for line in next((tmp_path / "w").rglob("*.jsonl")).read_text().splitlines()[1:]]
    assert {r["text"] for r in kept if r["turn"] == 1} == {"AGAIN"}


def test_what_a_server_answered_before_it_was_lost_is_kept(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}"}) + "\n" for i in range(20)))
    with chat_server(answers=19) as url:
        arguments = ("--url", url, "--dataset", f"gsm8k={tmp_path}/q.jsonl", "--work", tmp_path / "w")
        alone = ("--concurrency", 1, "--output", tmp_path / "o.json")
        code, said = run(*arguments, *alone)
        assert code == 2
        assert "did not answer a question" in said
        _Chat.left = 4  # as many as the last piece has
        code, said = run(*arguments, *alone)
    assert code == 0, said
    (row,) = [r for r in rows_of(tmp_path / "o.json") if "accepted_length" in r]
    assert (row["requests"], row["rounds"]) == (20, 80)


def test_a_server_that_others_use_is_no_measurement(world: Path, tmp_path: Path) -> None:
    with chat_server(strangers=5) as url:
        code, said = run("--url", url, "--dataset", f"gsm8k={world}/one.jsonl", "--work", tmp_path)
    assert code == 2
    assert "nobody else" in said
    code, said = run("--url", url, "--dataset", f"gsm8k={world}/one.jsonl", "--work", tmp_path)
    assert code == 2
    assert "/server_info failed" in said
