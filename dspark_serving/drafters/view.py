"""Views: a drafter of any format as a directory that SGLang and our model classes read, without copying its weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from dspark_serving.drafters.files import INDEX, weight_files
from dspark_serving.drafters.readers.deepspec import VOCABULARY_FILE, vocabulary_text
from dspark_serving.drafters.readers.own import canonical_config
from dspark_serving.drafters.spec import DrafterSpec
from dspark_serving.errors import CheckpointError

# What a drafter may bring besides its weights (cost: a directory); linked into the view when it is there.
COMPANIONS = ("calibration.json", "survival_map.json", "cost")


def make_view(spec: DrafterSpec, root: Path) -> Path:
    """The directory under `root` that serves this drafter: a canonical config.json and links to the weights.

    It is written aside and renamed, so that a view is whole or absent, also with several processes at once. A changed
    drafter gets another view: the name depends on path, size and time of its files and on the description.

    Raises:
        CheckpointError: the drafter has no safetensors files, or `root` cannot be written.
    """
    links = _links(spec.path)
    config = json.dumps(canonical_config(spec), indent=2) + "\n"
    view = root / "drafters" / _key(config, spec, links)
    if view.is_dir():
        return view
    try:
        view.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{view.name}.", dir=view.parent))
        try:
            _write(partial, config, spec, links)
            _publish(partial, view)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"the view of {spec.path} cannot be written to {view} ({error.strerror})",
            expected="a writable directory with a little space",
            fix="Free some space, or set another cache directory.",
        ) from error
    return view


def _links(directory: Path) -> dict[str, Path]:
    """What the view links to, by the name there: the weights, their index, and companions."""
    names = {path.relative_to(directory).as_posix(): path for path in weight_files(directory)}
    extra = {name: directory / name for name in (INDEX, *COMPANIONS) if (directory / name).exists()}
    return {name: path.resolve() for name, path in (names | extra).items()}


def _key(config: str, spec: DrafterSpec, links: dict[str, Path]) -> str:
    state = [(name, str(path), path.stat().st_size, path.stat().st_mtime_ns) for name, path in sorted(links.items())]
    text = json.dumps([str(spec.path.resolve()), state, config, spec.draft_token_ids])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(directory: Path, config: str, spec: DrafterSpec, links: dict[str, Path]) -> None:
    (directory / "config.json").write_text(config)
    if spec.draft_token_ids is not None:
        (directory / VOCABULARY_FILE).write_text(vocabulary_text(spec.draft_token_ids))
    for name, path in links.items():
        (directory / name).symlink_to(path)


def _publish(partial: Path, view: Path) -> None:
    """Move the written view into place, unless another process was first."""
    partial.chmod(0o755)  # mkdtemp's directories are private
    try:
        os.rename(partial, view)
    except OSError:
        if not view.is_dir():
            raise
