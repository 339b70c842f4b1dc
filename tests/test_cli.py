"""The command line: thin, and errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspark_training
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from dspark_serving.cli.main import app


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


COMMANDS = list(commands(get_command(app)))


def test_the_commands_are_those_of_the_readme() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert len(COMMANDS) > 15
    for command in COMMANDS:
        if len(command) == 1:
            assert f"dspark {command[0]}" in readme or f"make {command[0]}" in readme, command


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
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


def let_training_need(module: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a module that imports another one in the place of a module that every one of these commands imports."""
    (directory / "target.py").write_text(f"import {module}\n")
    monkeypatch.setattr(dspark_training, "__path__", [str(directory), *dspark_training.__path__])
    monkeypatch.delitem(sys.modules, "dspark_training.target", raising=False)


@pytest.mark.parametrize(
    "command",
    [
        "train --target t",
        "data answers p.jsonl --target t --out o.jsonl",
        "evaluate --target t --drafter d --dataset x={}/q.jsonl",
        "bundle import source made --target t",
    ],
)
def test_a_package_that_training_needs_and_nobody_installed_is_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "What?"}\n')
    let_training_need("not_installed.part", tmp_path, monkeypatch)
    code, _, err = run(*command.format(tmp_path).split())
    assert code == 2
    assert err == (
        "error: the package not_installed is not installed; expected the packages that training needs. "
        "Run `pip install 'dspark-serving[train]'`.\n"
    )


def test_a_module_of_its_own_that_is_missing_is_a_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_training_need("dspark_training.gone", tmp_path, monkeypatch)
    code, _, err = run("bundle", "import", "source", "made", "--target", "t")
    assert code == 1
    assert "pip install" not in err
