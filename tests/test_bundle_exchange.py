"""Bundles to and from other projects' formats: what stock SGLang's classes load, and equal drafts all the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dspark_training.bundle.foreign import FOREIGN_FORMATS, ForeignFormat, export_foreign
from dspark_training.bundle.imports import import_checkpoint
from dspark_training.bundle.manifest import check_manifest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dspark_serving.cli.main import app
from dspark_serving.drafters import check_fit, check_weights, read_spec
from dspark_serving.drafters.spec import Family
from dspark_serving.errors import CheckpointError, OptionError
from tests.bundle_models import PROMPT, SOME_IDS, drafts_by_file, export_tiny, tiny_target
from tests.published_formats import PUBLISHED, write_published


@contextmanager
def stock_model(path: Path, monkeypatch: pytest.MonkeyPatch, mode: str = "static") -> Iterator[Any]:
    """The drafter as SGLang without this plugin builds it on one rank, its weights loaded; every weight was NaN."""
    from sglang.srt.models import dspark
    from sglang.srt.runtime_context import get_context, get_parallel
    from sglang.srt.utils.hf_transformers_utils import get_config

    monkeypatch.setenv("SGLANG_RAGGED_VERIFY_MODE", mode)
    config = get_config(str(path), trust_remote_code=False)
    classes = {entry.__name__: entry for entry in dspark.EntryClass}
    with (
        get_context().override_server_args(device="cpu"),
        get_parallel().override(tp_size=1, tp_rank=0, attn_tp_size=1, attn_tp_rank=0),
    ):
        model = classes[config.architectures[0]](config)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        model.load_weights(iter(load_file(path / "model.safetensors").items()))
        yield model


@pytest.mark.parametrize("format", FOREIGN_FORMATS)
@pytest.mark.parametrize(
    ("family", "head"), [("dspark", "vanilla"), ("dspark", "gated"), ("dspark", "rnn"), ("dflash", "none")]
)
def test_stock_sglang_loads_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: ForeignFormat, family: Family, head: str
) -> None:
    from sglang.srt.speculative.dspark_components.dspark_config import resolve_runtime_config

    exported = export_tiny(tmp_path, family, head=head)
    spec = export_foreign(exported.path, tmp_path / "out", format, exported.target)
    assert spec.format == format
    check_fit(spec, json.loads((tmp_path / "llama" / "config.json").read_text()))
    assert drafts_by_file(tmp_path / "out", exported.target, PROMPT, tmp_path) == drafts_by_file(
        exported.path, exported.target, PROMPT, tmp_path
    )
    # Compact verification wants a confidence head of every drafter.
    mode = "compact" if family == "dspark" else "static"
    with stock_model(tmp_path / "out", monkeypatch, mode) as model:
        runtime = resolve_runtime_config(
            draft_hf_config=model.config, speculative_num_draft_tokens=None, target_vocab_size=512
        )
        assert (runtime.gamma, runtime.mask_token_id, model.sample_from_anchor) == (4, 3, True)
        loaded = dict(model.named_parameters())
        assert not [name for name, weight in loaded.items() if not torch.isfinite(weight).all()]
        ours = dict(exported.drafter.named_parameters())
        for name in ("fc.weight", "layers.1.mlp.down_proj.weight", *(n for n in ours if "head" in n)):
            torch.testing.assert_close(loaded[name].float(), ours[name], rtol=0, atol=0)
        if family == "dflash":
            assert not model.markov_head.markov_w2.weight.any()


def test_deepspecs_format_has_the_targets_tables(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, "eagle3")
    spec = export_foreign(exported.path, tmp_path / "out", "deepspec", exported.target)
    assert (spec.family, spec.architecture, spec.gamma) == ("eagle3", "Qwen3Eagle3Model", 4)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    embedding = exported.target.model.get_input_embeddings().weight
    assert torch.equal(weights["embed_tokens.weight"], embedding.bfloat16())
    assert torch.equal(weights["lm_head.weight"], exported.target.lm_head_weight_VD.bfloat16())
    assert drafts_by_file(tmp_path / "out", exported.target, PROMPT, tmp_path) == drafts_by_file(
        exported.path, exported.target, PROMPT, tmp_path
    )
    done = CliRunner().invoke(app, ["bundle", "export", str(exported.path), str(tmp_path / "no"), "--format", "gguf"])
    assert (done.exit_code, "gguf" in done.stderr) == (2, True)
    with pytest.raises(OptionError, match="without a target"):
        export_foreign(exported.path, tmp_path / "again", "deepspec")


def test_what_a_format_lacks_is_refused(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path / "a", "dspark", ids=SOME_IDS)
    with pytest.raises(CheckpointError, match="reduced vocabulary"):
        export_foreign(exported.path, tmp_path / "out", "specforge")
    spec = export_foreign(exported.path, tmp_path / "out", "specforge", whole_vocabulary=True)
    assert spec.draft_token_ids is None
    gemma = export_tiny(tmp_path / "b", "dspark", arch="gemma3")
    with pytest.raises(CheckpointError, match="scales embeddings"):
        export_foreign(gemma.path, tmp_path / "no", "specforge")
    chain = export_tiny(tmp_path / "c", "eagle3")
    with pytest.raises(CheckpointError, match="Llama's layers"):
        export_foreign(chain.path, tmp_path / "no", "specforge")
    assert not (tmp_path / "no").exists()


def deepspec_checkpoint(root: Path, name: str, *, copies: bool) -> tuple[Path, Any]:
    """One of DeepSpec's checkpoints beside a tiny target; with true copies of the target's tables, or random ones."""
    target = tiny_target(root, "gemma4" if "gemma4" in name else "qwen3")
    config = json.loads((Path(target.config._name_or_path) / "config.json").read_text())
    write_published(root / "published", config, name)
    if copies:
        path = root / "published" / "model.safetensors"
        tables = {
            "embed_tokens.weight": target.model.get_input_embeddings().weight.clone(),
            "lm_head.weight": target.lm_head_weight_VD.clone(),
        }
        save_file(load_file(path) | tables, path)
    return root / "published", target


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("deepspec")])
def test_a_checkpoint_of_deepspecs_becomes_a_bundle(tmp_path: Path, name: str) -> None:
    source, target = deepspec_checkpoint(tmp_path, name, copies=True)
    spec = import_checkpoint(source, target, tmp_path / "bundle")
    assert (spec.format, spec.own_head, spec.own_embedding) == ("dspark-serving", False, False)
    check_manifest(tmp_path / "bundle")
    check_weights(spec)
    kept = load_file(tmp_path / "bundle" / "model.safetensors")
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(kept)
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    before = {k: v.bfloat16() for k, v in load_file(source / "model.safetensors").items()}
    assert all(torch.equal(before[key], tensor) for key, tensor in kept.items())


def test_copies_that_are_none_become_the_drafters_own(tmp_path: Path) -> None:
    source, target = deepspec_checkpoint(tmp_path, "deepspec-dspark", copies=False)
    arguments = ["bundle", "import", str(source), str(tmp_path / "bundle"), "--target", str(tmp_path / "qwen3")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "its own embedding and output head" in done.output
    spec = read_spec(tmp_path / "bundle")
    assert (spec.own_head, spec.own_embedding) == (True, True)
    check_weights(spec)
    with pytest.raises(CheckpointError, match="output head of its own"):
        export_foreign(tmp_path / "bundle", tmp_path / "no", "specforge", target)


@pytest.mark.parametrize("name", ["z-lab-dflash-windowed", "speculators-dspark", "llama-eagle3", "specforge-dspark"])
def test_other_formats_become_bundles_too(tmp_path: Path, name: str) -> None:
    source, target = deepspec_checkpoint(tmp_path, name, copies=False)
    spec = import_checkpoint(source, target, tmp_path / "bundle")
    original = read_spec(source)
    check_weights(spec)
    fields = ("family", "layer_kind", "gamma", "draft_token_ids", "sliding_window", "own_head", "anchor_predicts")
    for field in fields:
        assert getattr(spec, field) == getattr(original, field), field


def test_a_drafter_of_another_target_is_not_imported(tmp_path: Path) -> None:
    source, _ = deepspec_checkpoint(tmp_path, "deepspec-dspark", copies=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_target_layers": 9}))
    with pytest.raises(CheckpointError, match="another target"):
        import_checkpoint(source, tiny_target(tmp_path, "qwen3"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
