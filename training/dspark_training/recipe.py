"""From recipe parts, the command line and the target to one validated configuration.

A recipe is composed: what the target suggests, then the algorithm's part, then the parts that the user names, then
single fields. Later ones win, field by field.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dspark_serving.assets.store import checkpoint_name, sha256_of
from dspark_serving.errors import OptionError
from dspark_training.config import RunConfig
from dspark_training.features.cache import target_fingerprint
from dspark_training.target import Target

RECIPES = Path(__file__).parent / "recipes"
ALGORITHMS = ("dspark", "dflash", "eagle3")
_FEATURE_LAYERS = 5
_WRITTEN_PROMPTS = {"chat": 1500}

Fields = dict[str, Any]


def load_recipe(
    target: Target,
    parts: Sequence[str | Path] = (),
    algorithm: str | None = None,
    overrides: Iterable[str] = (),
) -> RunConfig:
    """Compose and validate a configuration.

    Args:
        target: what is left open comes from it, see `complete_from`.
        parts: JSON files, or names of shipped ones (recipes/targets, recipes/algorithms); later ones win.
        algorithm: one of ALGORITHMS; None: what the parts say, else dspark.
        overrides: "optim.steps=500"; the value is JSON, or else a string.

    Raises:
        OptionError: a part is missing or no JSON, or a field is unknown or out of bounds; names the first such field.
    """
    read = [read_part(part) for part in parts]
    single = [parse_override(text) for text in overrides]
    named = [fields["algorithm"] for fields in [*read, *single] if "algorithm" in fields]
    chosen = algorithm or (named[-1] if named else "dspark")
    if chosen not in ALGORITHMS:
        raise OptionError(f"algorithm {chosen!r}", expected=f"one of {', '.join(ALGORITHMS)}", fix="Correct it.")
    fields = merge([read_part(RECIPES / "algorithms" / f"{chosen}.json"), *read, {"algorithm": chosen}, *single])
    return validated(complete_from(target, fields))


def read_part(part: str | Path) -> Fields:
    """A recipe file, or a shipped one by its name without ".json"."""
    path = Path(part)
    shipped = [p for p in RECIPES.glob("*/*.json") if p.stem == str(part)]
    if not path.exists() and not shipped:
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*/*.json")))
        raise OptionError(
            f"there is no recipe {part}", expected=f"a JSON file, or one of {names}", fix="Check the path."
        )
    path = path if path.exists() else shipped[0]
    try:
        fields = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise OptionError(f"{path} is no JSON ({error})", expected="a recipe", fix="Correct the file.") from None
    if not isinstance(fields, dict):
        raise OptionError(f"{path} holds a {type(fields).__name__}", expected="a JSON object", fix="Correct the file.")
    return fields


def parse_override(text: str) -> Fields:
    """ "optim.steps=500" as {"optim": {"steps": 500}}."""
    name, separator, value = text.partition("=")
    if not separator or not all(name.split(".")):
        raise OptionError(f"--set {text}", expected="FIELD=VALUE, as in optim.steps=500", fix="Correct it.")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    for key in reversed(name.split(".")):
        parsed = {key: parsed}
    return dict(parsed)


def merge(parts: Iterable[Fields]) -> Fields:
    """Field by field, later parts win; a dictionary inside a group (prompts by domain) is replaced as a whole."""
    merged: Fields = {}
    for part in parts:
        for key, value in part.items():
            both = key in RunConfig.model_fields and isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = {**merged[key], **value} if both else value
    return merged


def complete_from(target: Target, fields: Fields) -> Fields:
    """Fill in what no part says and the target decides, so that a path to a target is enough.

    Feature layers are spread over its depth, the mask token is one that text does not contain, the draft layers start
    from its last ones, and without prompts it writes them itself.
    """
    c = target.config
    data, drafter = dict(fields.get("data", {})), dict(fields.get("drafter", {}))
    last = c.num_hidden_layers - 2  # the last layer's output is only exposed after the final norm
    count = min(_FEATURE_LAYERS, last + 1)
    spread = sorted({round(min(1, last) + i * (last - min(1, last)) / max(1, count - 1)) for i in range(count)})
    drafter.setdefault("target_layer_ids", spread)
    if "mask_token_id" not in drafter:
        drafter["mask_token_id"] = mask_token_id(target)
    drafter.setdefault("draft_vocab_size", min(8192, c.vocab_size))
    layers = drafter.get("num_layers", 2)
    if isinstance(layers, int):
        first = max(0, c.num_hidden_layers - layers)
        drafter.setdefault("init_layers", list(range(first, c.num_hidden_layers)))
    if not any(data.get(source) for source in ("samples", "prompts", "written_prompts")):
        data["written_prompts"] = _WRITTEN_PROMPTS
    if data.get("written_prompts"):
        data.setdefault("openings", str(RECIPES / "seeds.json"))
    return {**fields, "data": data, "drafter": drafter}


def mask_token_id(target: Target) -> int:
    """A token that text does not contain: a mask token, a special one outside the chat template, or the last unused id.

    A full vocabulary without special tokens leaves an ordinary token, the last one that a greeting does not contain. A
    target without a chat template has no greeting.
    """
    tokenizer, size = target.tokenizer, target.config.vocab_size
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id < size:
        return int(tokenizer.mask_token_id)
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}
    used |= set(target.stop_ids)
    if getattr(tokenizer, "chat_template", None):
        used |= set(target.chat_ids("Hello, how are you?"))
    special = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special and i not in used and i < size]
    return int(max(special, default=next(i for i in reversed(range(size)) if i not in used)))


def validated(fields: Fields) -> RunConfig:
    """The configuration, or an OptionError that names the first wrong field."""
    try:
        return RunConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the recipe"
        raise OptionError(
            f"{field} is wrong ({first['msg']})", expected="a valid recipe", fix="Correct that field."
        ) from None


def provenance(config: RunConfig, target: Target, files: Iterable[Path] = ()) -> Fields:
    """What a result depends on: the resolved configuration, the target, sha256 of data files, versions."""
    name = checkpoint_name(target.model.name_or_path) or "the target"
    packages = ("torch", "transformers", "accelerate", "dspark-serving")
    return {
        "recipe": config.model_dump(mode="json"),
        "target": {"name": name, "fingerprint": target_fingerprint(target)},
        "data_sha256": data_sha256(files),
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in packages},
    }


def data_sha256(files: Iterable[Path]) -> dict[str, str]:
    """Hash of each file that exists, by its path."""
    return {str(path): sha256_of(path) for path in files if path.is_file()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
