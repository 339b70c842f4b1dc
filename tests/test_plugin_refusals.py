"""What a user sees when the real launcher refuses: one clear line, no traceback, a non-zero exit."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.server import run_to_exit, speculation
from tests.tiny_models import make_tiny_drafter, make_tiny_target

pytestmark = pytest.mark.real_server


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    make_tiny_drafter(root / "drafter", make_tiny_target(root / "target"), target_layer_ids=[0, 1])
    return root / "target", root / "drafter"


def complaint(status: int, error: str) -> str:
    assert status == 1
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("dspark: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_damaged_drafter(models: tuple[Path, Path]) -> None:
    file = models[1] / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    try:
        found = complaint(*run_to_exit(models[0], *speculation(models[1])))
    finally:
        file.write_bytes(content)
    assert f"{file} is damaged" in found


def test_a_port_in_use(models: tuple[Path, Path]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in complaint(
            *run_to_exit(models[0], *speculation(models[1]), "--port", str(port))
        )


def test_a_bad_option(models: tuple[Path, Path]) -> None:
    assert "--dspark-threshold (or DSPARK_THRESHOLD) is '7'" in complaint(
        *run_to_exit(models[0], *speculation(models[1]), "--dspark-threshold", "7")
    )
