"""Bundles of every family: read by serving's readers, and drafting what was exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dspark_training.bundle.export import load_bundle, write_bundle
from dspark_training.bundle.manifest import check_manifest
from dspark_training.bundle.network import describe_drafter
from dspark_training.bundle.rounds import held_out_rounds
from dspark_training.data.store import Sample
from dspark_training.features.source import OnlineFeatures

from dspark_serving.drafters import check_fit, check_weights, read_spec
from dspark_serving.drafters.spec import Family
from dspark_serving.errors import CheckpointError
from tests.bundle_models import LAYER_IDS, PROMPT, SOME_IDS, Exported, drafts_by_file, export_tiny, tiny_target
from tests.published_formats import PUBLISHED, write_published
from tests.tiny_blocks import make_tiny_block
from tests.tiny_models import Arch

FAMILIES: list[tuple[Family, str]] = [
    ("dspark", "vanilla"),
    ("dspark", "gated"),
    ("dspark", "rnn"),
    ("dflash", "none"),
    ("eagle3", "none"),
]


def drafted_in_torch(exported: Exported, ids: list[int], path: Path | None = None) -> int:
    """How many tokens of a walked text are drafted as the files' own reference drafts them."""
    drafter, spec = load_bundle(path or exported.path, target=exported.target)
    assert spec.target_layer_ids == LAYER_IDS
    text = drafts_by_file(path or exported.path, exported.target, ids, exported.path.parent)
    sample = Sample("x", "math", 0.0, [*ids, *text], [(len(ids) - 1, len(ids) + len(text))])
    source = OnlineFeatures(exported.target, LAYER_IDS)
    return int(held_out_rounds(exported.target, drafter, source, exported.vocab, [sample]).accepted_N[0])


@pytest.mark.parametrize("ids", [None, SOME_IDS], ids=["whole", "reduced"])
@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_a_bundle_is_what_was_trained(tmp_path: Path, family: Family, head: str, ids: tuple[int, ...] | None) -> None:
    exported = export_tiny(tmp_path, family, head=head, ids=ids)
    spec = check_fit(read_spec(exported.path), json.loads((tmp_path / "llama" / "config.json").read_text()))
    assert (spec.family, spec.gamma, spec.draft_token_ids) == (family, 4, ids)
    assert spec.has_confidence == (family == "dspark")
    check_weights(spec)
    check_manifest(exported.path)
    loaded, _ = load_bundle(exported.path)
    for name, weight in exported.drafter.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=0)
    assert drafted_in_torch(exported, PROMPT) == spec.gamma


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("family", ["dspark", "eagle3"])
def test_other_targets(tmp_path: Path, arch: Arch, family: Family) -> None:
    exported = export_tiny(tmp_path, family, arch=arch)
    spec = check_fit(read_spec(exported.path), json.loads((tmp_path / arch / "config.json").read_text()))
    assert spec.embed_scale == pytest.approx(48**0.5 if arch == "gemma3" else 1.0)
    assert drafted_in_torch(exported, PROMPT) == spec.gamma


def test_a_gemma_targets_cap_is_the_drafters(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, "dspark", arch="gemma3")
    exported.target.config.final_logit_softcapping = 8.0
    spec = describe_drafter(exported.drafter, exported.target, LAYER_IDS, exported.vocab, exported.path)
    write_bundle(exported.path, spec, exported.drafter.state_dict(), {})
    assert read_spec(exported.path).final_logit_softcapping == 8.0
    assert drafted_in_torch(exported, PROMPT) == spec.gamma
    exported.target.config.final_logit_softcapping = None
    with pytest.raises(CheckpointError, match="caps logits at 8"):
        load_bundle(exported.path, target=exported.target)


def test_a_drafter_that_reads_other_layers_drafts_something_else(tmp_path: Path) -> None:
    """Negative control of the comparison above."""
    exported = export_tiny(tmp_path, "dspark")
    drafter, spec = load_bundle(exported.path)
    text = drafts_by_file(exported.path, exported.target, PROMPT, tmp_path)
    sample = Sample("x", "math", 0.0, [*PROMPT, *text], [(len(PROMPT) - 1, len(PROMPT) + len(text))])
    source = OnlineFeatures(exported.target, LAYER_IDS[::-1])
    assert held_out_rounds(exported.target, drafter, source, exported.vocab, [sample]).accepted_N[0] < spec.gamma


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_drafters_load_or_say_why_not(tmp_path: Path, name: str) -> None:
    target = tiny_target(tmp_path, "gemma4" if "gemma4" in name else "qwen3")
    write_published(
        tmp_path / "drafter", json.loads((Path(target.config._name_or_path) / "config.json").read_text()), name
    )
    reasons = {
        "gemma4": "gemma4's",
        "windowed": "sliding window",
        "z-lab": "anchor's row",
        "specforge-dflash": "anchor's row",
        "after-anchor": "anchor's row",
        "speculators": "own",
        "llama-eagle3": "llama's",
    }
    reason = next((words for part, words in reasons.items() if part in name), None)
    if reason is None:
        drafter, spec = load_bundle(tmp_path / "drafter")
        assert spec.format in ("deepspec", "specforge")
        assert drafter.dims.block_size == spec.gamma
    else:
        with pytest.raises(CheckpointError, match=reason):
            load_bundle(tmp_path / "drafter")


def test_a_head_that_does_not_see_the_markov_embedding_is_refused(tmp_path: Path) -> None:
    make_tiny_block(tmp_path / "d", {"hidden_size": 48, "vocab_size": 64, "num_hidden_layers": 4},
                    confidence_head_with_markov=False)  # fmt: skip
    with pytest.raises(CheckpointError, match="confidence head"):
        load_bundle(tmp_path / "d")
