"""Recipes: composed, overridden, completed from the target, and named when they are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dspark_training.config import RunConfig
from dspark_training.features.cache import target_fingerprint
from dspark_training.recipe import ALGORITHMS, load_recipe, mask_token_id, provenance
from dspark_training.target import Target
from dspark_training.trainer import Trainer

from dspark_serving.errors import OptionError
from tests.test_training_run import config, samples
from tests.tiny_models import Arch, make_tiny_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = tmp_path_factory.mktemp("target")
    make_tiny_target(path, "llama")
    return Target.load(path)


def test_a_recipe_is_composed_and_every_field_can_be_overridden(target: Target, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"optim": {"steps": 9}, "data": {"written_prompts": {"math": 5}}}))
    parts: list[str | Path] = ["smollm2_135m", own]
    fits = ["drafter.target_layer_ids=[0,2]", "drafter.mask_token_id=3"]
    got = load_recipe(target, parts, "dflash", ["optim.clip_norm=0.5", "features.codec=int4", *fits])
    assert got.algorithm == "dflash"
    assert got.drafter.markov_head_type == "none"  # the algorithm's part
    assert got.drafter.block_size == 5  # the target's part
    assert got.optim.steps == 9  # a later part wins
    assert got.data.written_prompts == {"math": 5}  # and replaces prompts by domain as a whole
    assert (got.optim.clip_norm, got.features.codec) == (0.5, "int4")
    assert got.drafter.target_layer_ids == (0, 2)
    assert load_recipe(target, ["smollm2_135m"], None, fits).algorithm == "dspark"
    assert load_recipe(target, [], None, ["algorithm=eagle3"]).algorithm == "eagle3"


def test_bad_recipes_are_named(target: Target, tmp_path: Path) -> None:
    torn, listed = tmp_path / "torn.json", tmp_path / "listed.json"
    torn.write_text("{")
    listed.write_text("[]")
    parts: list[tuple[str | Path, str]] = [("nowhere.json", "nowhere"), (torn, "torn"), (listed, "list")]
    for part, wrong in parts:
        with pytest.raises(OptionError, match=wrong):
            load_recipe(target, [part])
    for override, wrong in [
        ("optim.learning_rat=1", "learning_rat"),
        ("optim.steps=many", "optim.steps"),
        ("optim.steps", "FIELD=VALUE"),
        ("optim.micro_batches=3", "micro_batches"),
        ("algorithm=medusa", "medusa"),
    ]:
        with pytest.raises(OptionError, match=wrong):
            load_recipe(target, [], None, [override])


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_path_to_a_target_is_enough(tmp_path: Path, arch: Arch, algorithm: str) -> None:
    make_tiny_target(tmp_path / "target", arch)
    unseen = Target.load(tmp_path / "target")
    told = load_recipe(unseen, [], algorithm, ["optim.steps=6", "optim.pool=2", "optim.anchors=4"])
    assert told.drafter.target_layer_ids == (1, 2)  # four layers; the last one's output is not exposed
    Trainer(told, unseen, samples(), tmp_path / "work").run()


def test_the_mask_token_is_no_part_of_text(target: Target) -> None:
    chosen = mask_token_id(target)
    assert 0 <= chosen < target.config.vocab_size
    assert chosen not in target.stop_ids
    assert chosen not in target.chat_ids("Hello, how are you?")


def test_a_target_without_a_chat_template_gets_a_mask_token_too(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target.tokenizer, "chat_template", None)
    assert load_recipe(target, [], None, ["drafter.mask_token_id=3"]).drafter.mask_token_id == 3
    chosen = load_recipe(target).drafter.mask_token_id
    assert 0 <= chosen < target.config.vocab_size
    assert chosen not in target.stop_ids


def test_a_result_names_what_it_depends_on(target: Target, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("abc")
    origin = provenance(config(4), target, [data, tmp_path / "absent"])
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2's example
    assert origin["data_sha256"] == {str(data): sha256}
    assert RunConfig.model_validate(origin["recipe"]) == config(4)
    assert origin["versions"]["torch"] == torch.__version__
    assert origin["target"]["fingerprint"] == target_fingerprint(target)
