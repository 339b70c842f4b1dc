"""The command line: thin, and errors in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspark_serving.cli.main import app


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("assets",),
        ("assets", "smollm2"),
        ("calibrate",),
        ("replay",),
        ("demo",),
        ("inspect",),
        ("train",),
        ("train-demo",),
    ],
)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Usage:" in out


def test_an_unknown_command_is_a_usage_error() -> None:
    code, _, err = run("dance")
    assert code == 2
    assert "No such command 'dance'" in err


def test_a_problem_is_one_line_and_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "file"))
    code, out, err = run("assets", "smollm2", "--dtype", "bf16")
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "DSPARK_CACHE" in err
