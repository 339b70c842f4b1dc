"""Every published format: read into the right description, through a view and back, with every weight accounted for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen3Config

from dspark_serving.drafters import DrafterSpec, canonical_names, check_fit, check_weights, make_view, read_spec
from dspark_serving.drafters.registry import READERS
from dspark_serving.drafters.weights import expected_shapes, weight_problems
from dspark_serving.errors import CheckpointError
from tests.published_formats import PUBLISHED, PUBLISHED_GEMMA4, write_published
from tests.published_parts import DRAFT_VOCAB
from tests.tiny_models import VOCAB_SIZE

# A target's config as transformers writes it: Qwen3- and Llama-shaped ones say the same to a drafter.
TARGET: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "eos_token_id": VOCAB_SIZE - 1,
    "dtype": "float32",
}
# The text config of a Gemma 4 target whose full-attention layers share keys and values.
GEMMA4_TEXT: dict[str, Any] = TARGET | {
    "model_type": "gemma4_text",
    "head_dim": 8,
    "num_key_value_heads": 3,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": 30.0,
    "use_double_wide_mlp": False,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
    "eos_token_id": [1, 106],
}
GEMMA4: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "text_config": GEMMA4_TEXT,
}

# What each must be read as: format, family, layers, drafted tokens, anchor predicts, own head, own embedding, reduced.
READ_AS: dict[str, tuple[str, str, str, int, bool, bool, bool, bool]] = {
    "deepspec-dspark": ("deepspec", "dspark", "qwen3", 4, True, False, False, False),
    "deepspec-dspark-gated": ("deepspec", "dspark", "qwen3", 4, True, False, False, False),
    "deepspec-dspark-rnn": ("deepspec", "dspark", "qwen3", 4, True, False, False, False),
    "deepspec-dflash": ("deepspec", "dflash", "qwen3", 4, True, False, False, False),
    "deepspec-eagle3": ("deepspec", "eagle3", "qwen3", 4, True, False, False, False),
    "deepspec-gemma4-dspark": ("deepspec", "dspark", "gemma4", 4, True, False, False, False),
    "deepspec-gemma4-dflash": ("deepspec", "dflash", "gemma4", 4, True, False, False, False),
    "deepspec-gemma4-eagle3": ("deepspec", "eagle3", "gemma4", 4, True, False, False, False),
    "z-lab-dflash": ("z-lab", "dflash", "qwen3", 4, False, False, False, False),
    "z-lab-dflash-windowed": ("z-lab", "dflash", "qwen3", 4, False, False, False, False),
    "specforge-dspark": ("specforge", "dspark", "qwen3", 4, True, False, False, False),
    "specforge-dspark-windowed": ("specforge", "dspark", "qwen3", 4, True, False, False, False),
    "specforge-dspark-as-dflash": ("specforge", "dspark", "qwen3", 4, True, False, False, False),
    "specforge-dflash": ("specforge", "dflash", "qwen3", 4, False, False, False, False),
    "speculators-dspark": ("speculators", "dspark", "qwen3", 4, True, True, False, True),
    "speculators-dspark-after-anchor": ("speculators", "dspark", "qwen3", 4, False, False, False, False),
    "speculators-dspark-windowed": ("speculators", "dspark", "qwen3", 4, False, False, False, False),
    "speculators-dflash": ("speculators", "dflash", "qwen3", 4, False, True, False, True),
    "speculators-eagle3": ("speculators", "eagle3", "llama", 4, True, True, True, True),
    "speculators-eagle3-qwen3": ("speculators", "eagle3", "qwen3", 4, True, True, True, True),
    "llama-eagle3": ("eagle3", "eagle3", "llama", 5, True, True, False, True),
    "llama-eagle3-own-embedding": ("eagle3", "eagle3", "llama", 5, True, True, True, True),
    "llama-eagle3-whole-vocabulary": ("eagle3", "eagle3", "llama", 5, True, True, False, False),
}


def target_of(name: str) -> dict[str, Any]:
    return GEMMA4 if name in PUBLISHED_GEMMA4 else TARGET


def written(path: Path, name: str) -> DrafterSpec:
    write_published(path, target_of(name), name)
    return read_spec(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_reads_every_format(tmp_path: Path, name: str) -> None:
    spec = check_fit(written(tmp_path, name), target_of(name))
    found = (spec.format, spec.family, spec.layer_kind, spec.gamma, spec.anchor_predicts)
    assert (*found, spec.own_head, spec.own_embedding, spec.draft_token_ids is not None) == READ_AS[name]
    assert (spec.target_layer_ids, spec.num_target_layers) == ((0, 1, 2), 4)
    assert spec.draft_token_ids in (None, DRAFT_VOCAB)
    assert spec.mask_token_id == (None if spec.family == "eagle3" else 3)
    assert spec.has_confidence == (spec.family == "dspark")
    assert (spec.hidden_size, spec.vocab_size, spec.layers) == (48, 512, 1 if spec.family == "eagle3" else 2)
    check_weights(spec)


@pytest.mark.parametrize("name", PUBLISHED)
def test_calls_for_exactly_the_weights_of_the_format(tmp_path: Path, name: str) -> None:
    spec = written(tmp_path, name)
    target = target_of(name)
    _, shapes, _ = PUBLISHED[name](dict(target.get("text_config") or target), [0, 1, 2])
    rename = canonical_names(spec.format)
    loaded = {canonical: shape for key, shape in shapes.items() if (canonical := rename(key)) is not None}
    copies = set(loaded) - set(expected_shapes(spec))
    assert copies <= {"embed_tokens.weight", "lm_head.weight"}
    assert {key: shape for key, shape in loaded.items() if key not in copies} == expected_shapes(spec)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_view_says_the_same_and_copies_nothing(tmp_path: Path, name: str) -> None:
    spec = check_fit(written(tmp_path / "drafter", name), target_of(name))
    view = make_view(spec, tmp_path / "cache")
    assert replace(read_spec(view), path=spec.path) == spec
    assert (view / "model.safetensors").is_symlink()
    check_weights(read_spec(view))
    config = AutoConfig.from_pretrained(view)  # what SGLang reads it with
    assert config.architectures[0].startswith("DsparkServing")
    assert config.rope_parameters["rope_theta"] == spec.rope["rope_theta"]


@pytest.mark.parametrize("name", ["deepspec-gemma4-dspark", "deepspec-gemma4-eagle3"])
def test_gemma4_layers_have_the_sizes_of_full_attention(tmp_path: Path, name: str) -> None:
    spec = written(tmp_path, name)
    shapes = expected_shapes(spec)
    inputs = 96 if spec.family == "eagle3" else 48
    assert shapes["layers.0.self_attn.k_proj.weight"] == (2 * 32, inputs)
    assert "layers.0.self_attn.v_proj.weight" not in shapes
    assert not [key for key in shapes if "v_norm" in key]
    assert shapes["layers.0.layer_scalar"] == (1,)
    assert spec.embed_scale == pytest.approx(48**0.5)
    assert (spec.final_logit_softcapping, spec.hidden_act) == (30.0, "gelu_pytorch_tanh")
    assert spec.rope == GEMMA4_TEXT["rope_parameters"]["full_attention"]


def test_gemma4_layers_without_shared_values_keep_v_proj(tmp_path: Path) -> None:
    target = GEMMA4 | {"text_config": GEMMA4_TEXT | {"attention_k_eq_v": False}}
    write_published(tmp_path, target, "deepspec-gemma4-dspark")
    spec = read_spec(tmp_path)
    assert expected_shapes(spec)["layers.1.self_attn.v_proj.weight"] == (3 * 32, 48)
    check_weights(spec)


@pytest.mark.parametrize("config_class", [Qwen3Config, LlamaConfig])
def test_speculators_leave_out_what_is_the_default_of_the_class(tmp_path: Path, config_class: Any) -> None:
    """A nested config with no fields at all must read as transformers' class without arguments."""
    usual = config_class()
    config = write_published(tmp_path, TARGET, "speculators-dspark-after-anchor")
    config |= {
        "transformer_layer_config": {"model_type": usual.model_type, "num_hidden_layers": 2},
        "draft_vocab_size": usual.vocab_size,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_spec(tmp_path)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    for field in (*sizes, "max_position_embeddings", "rms_norm_eps", "hidden_act"):
        assert getattr(spec, field) == getattr(usual, field), field


@pytest.mark.parametrize(("depth", "layers"), [(28, (1, 13, 24)), (32, (1, 15, 28)), (36, (1, 17, 32))])
def test_eagle3_takes_the_default_layers_of_its_target(tmp_path: Path, depth: int, layers: tuple[int, ...]) -> None:
    """Inputs of layers 2, n/2 and n-3 are the outputs of the layers before them."""
    edit_config(tmp_path, "llama-eagle3", eagle_config=None)
    spec = read_spec(tmp_path)
    assert (spec.target_layer_ids, spec.num_target_layers) == ((), None)
    assert check_fit(spec, TARGET | {"num_hidden_layers": depth}).target_layer_ids == layers
    with pytest.raises(CheckpointError, match="4 layers are too few"):
        check_fit(spec, TARGET)


def test_a_longer_name_with_model_is_the_same_weight() -> None:
    assert canonical_names("deepspec")("model.layers.0.mlp.up_proj.weight") == "layers.0.mlp.up_proj.weight"
    assert canonical_names("eagle3")("midlayer.hidden_norm.weight") == "layers.0.hidden_norm.weight"
    assert canonical_names("eagle3")("d2t") is None
    assert canonical_names("speculators")("verifier_norm.weight") is None


def test_a_drafter_in_canonical_form_is_a_drafter_itself(tmp_path: Path) -> None:
    spec = check_fit(written(tmp_path / "drafter", "deepspec-dflash"), TARGET)
    direct = make_view(replace(spec, format="dspark-serving"), tmp_path / "cache")
    assert read_spec(direct).format == "dspark-serving"
    assert weight_problems(read_spec(direct)) == []
    assert set(READERS) == {"dspark-serving", "speculators", "deepspec", "specforge", "z-lab", "eagle3"}


def test_rope_settings_of_either_spelling_are_the_same(tmp_path: Path) -> None:
    older = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 500000.0}
    newer = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500000.0}}
    edit_config(tmp_path / "older", "z-lab-dflash", **older)
    edit_config(tmp_path / "newer", "z-lab-dflash", rope_theta=None, **newer)
    assert read_spec(tmp_path / "older").rope == read_spec(tmp_path / "newer").rope == newer["rope_parameters"]


def edit_config(path: Path, name: str, **fields: Any) -> None:
    """Write the drafter `name` with changed fields; None removes one."""
    config = write_published(path, target_of(name), name) | fields
    kept = {key: value for key, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept))
