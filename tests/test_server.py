"""The launcher of servers, against a stand-in for `python -m sglang.launch_server` that starts at once."""

from __future__ import annotations

import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from dspark_serving.demo import Arm
from dspark_serving.errors import EnvironmentMismatchError
from dspark_serving.server import Answer, running_server

StandIn = Callable[[str], None]

# Answers as SGLang does: speculation details only where the drafter's flag is given.
SERVING = """
import http.server, json, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
open(sys.argv[sys.argv.index("--model-path") + 1] + "/pids", "w").write(f"{child.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, body):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.answer({})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["temperature"] == 0 and asked["messages"][0]["content"] == "Hi"
        details = {"spec_verify_ct": 3} if "--speculative-algorithm" in sys.argv else None
        self.answer({"choices": [{"message": {"content": "Hello"}}], "usage": {"completion_tokens": 10},
                     "sglext": {"spec_tokens_details": details} if details else None})
port = int(sys.argv[sys.argv.index("--port") + 1])
host = sys.argv[sys.argv.index("--host") + 1]
http.server.HTTPServer((host, port), Handler).serve_forever()
"""
DYING = "import sys; print('loading\\nValueError: no such model\\nbye'); sys.exit(3)"
HANGING = "import time; time.sleep(600)"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    def install(program: str) -> None:
        (tmp_path / "program.py").write_text(program)
        executable = tmp_path / "python"
        executable.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "program.py"} "$@"\n')
        executable.chmod(stat.S_IRWXU)
        monkeypatch.setattr(sys, "executable", str(executable))

    return install


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def has_ended(pid: int) -> bool:
    """Whether a process that was told to end does so."""
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_a_server_is_asked_and_ended_with_its_children(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in(SERVING)
    with running_server(tmp_path, log=tmp_path / "logs" / "log") as running:
        answer = running.chat("Hi", max_tokens=16)
        child = int((tmp_path / "pids").read_text())
        assert is_running(child)
    assert (answer.text, answer.output_tokens, answer.rounds) == ("Hello", 10, None)
    assert answer.accepted_length is None
    assert has_ended(child)


def test_rounds_are_read_from_a_speculating_server(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in(SERVING)
    with running_server(tmp_path, ["--speculative-algorithm", "dspark"], log=tmp_path / "log") as running:
        answer = running.chat("Hi", max_tokens=16)
    assert answer.rounds == 3
    assert answer.accepted_length == pytest.approx((10 - 1) / 3)


def test_a_server_that_dies_is_reported_by_its_own_words(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in(DYING)
    with (
        pytest.raises(EnvironmentMismatchError, match=r"ended with code 3 .*ValueError: no such model; .*log is /"),
        running_server(tmp_path, log=tmp_path / "log"),
    ):
        pytest.fail("it was never ready")


def test_a_server_that_hangs_is_given_up_and_ended(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in(f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{HANGING}")
    with (
        pytest.raises(EnvironmentMismatchError, match="not ready after 5 s"),
        running_server(tmp_path, log=tmp_path / "log", ready_seconds=5.0),
    ):
        pytest.fail("it was never ready")
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_a_server_is_ended_when_its_user_is_interrupted(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in(SERVING)
    interrupt = Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt), running_server(tmp_path, log=tmp_path / "log") as running:
        interrupt()
    child = int((tmp_path / "pids").read_text())
    with pytest.raises(EnvironmentMismatchError, match="did not answer"):
        running.chat("Hi", max_tokens=1)
    assert has_ended(child)


def test_an_arms_figures_weigh_answers_by_their_length() -> None:
    arm = Arm("dspark", (Answer("a", 11, 1.0, 5), Answer("b", 101, 9.0, 25)))
    assert arm.accepted_length == pytest.approx((10 + 100) / 30)
    assert arm.tokens_per_second == pytest.approx(11.2)
    assert Arm("plain", (Answer("a", 11, 1.0, None),)).accepted_length is None
