"""Block drafters whose layers attend in a sliding window: what they say of it, and what SGLang makes of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.models.dflash import _get_dflash_layer_attention_params
from transformers import AutoConfig, Qwen3Config

from dspark_serving.drafters import check_fit, make_view, read_spec
from tests.published_formats import write_published
from tests.published_parts import WINDOW
from tests.test_drafters_formats import TARGET, edit_config, target_of
from tests.test_drafters_published import DFLASH_QWEN3_32B, read

# z-lab/Qwen3.5-4B-DFlash, read 2026-08
DFLASH_QWEN35_4B: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "bos_token_id": None,
    "dflash_config": {
        "block_size": 16,
        "mask_token_id": 248077,
        "target_layer_ids": [1, 5, 9, 13, 17, 21, 25, 29],
    },
    "dtype": "bfloat16",
    "eos_token_id": 248044,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "max_position_embeddings": 262144,
    "max_window_layers": 6,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 6,
    "num_key_value_heads": 8,
    "num_target_layers": 32,
    "pad_token_id": None,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000000, "rope_type": "default"},
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "transformers_version": "5.7.0",
    "use_cache": True,
    "use_sliding_window": True,
    "vocab_size": 248320,
}
# RedHatAI/GLM-5.3-speculator.dspark
SPECULATOR_GLM53: dict[str, Any] = {
    "architectures": ["DSparkDraftModel"],
    "aux_hidden_state_layer_ids": [2, 20, 39, 58, 75],
    "block_size": 8,
    "confidence_head_with_markov": True,
    "draft_vocab_size": 154880,
    "dtype": "bfloat16",
    "enable_confidence_head": True,
    "markov_head_type": "vanilla",
    "markov_rank": 256,
    "mask_token_id": 154856,
    "sample_from_anchor": True,
    "sliding_window_non_causal": False,
    "speculators_config": {
        "algorithm": "dspark",
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 8, "verifier_accept_k": 1}
        ],
        "verifier": {"architectures": ["GlmMoeDsaForCausalLM"], "name_or_path": "zai-org/GLM-5.3"},
    },
    "speculators_model_type": "dspark",
    "speculators_version": "0.7.0.dev108",
    "target_hidden_size": None,
    "tie_word_embeddings": False,
    "transformer_layer_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 6144,
        "intermediate_size": 12288,
        "layer_types": ["sliding_attention"] * 3,
        "max_position_embeddings": 1048576,
        "model_type": "qwen3",
        "num_attention_heads": 64,
        "num_hidden_layers": 3,
        "num_key_value_heads": 64,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
        "sliding_window": 2048,
        "use_sliding_window": True,
        "vocab_size": 154880,
    },
}

BOTH, BEFORE = AttentionType.ENCODER_ONLY, AttentionType.DECODER
# Of each layer: how many positions before its own a row sees (-1: all), and in which direction it sees its block.
SEEN = {
    "z-lab-dflash": [(-1, BOTH), (-1, BOTH)],
    "z-lab-dflash-windowed": [(WINDOW - 1, BEFORE), (-1, BOTH)],
    "specforge-dspark-windowed": [(WINDOW - 1, BEFORE), (-1, BEFORE)],
    "speculators-dspark-windowed": [(WINDOW - 1, BOTH), (-1, BOTH)],
    "deepspec-gemma4-dspark": [(-1, BOTH), (-1, BOTH)],  # its target has windows, it has none
}


@pytest.mark.parametrize("name", SEEN)
def test_sglang_reads_from_the_view_what_rows_see(tmp_path: Path, name: str) -> None:
    write_published(tmp_path / "drafter", target_of(name), name)
    view = make_view(check_fit(read_spec(tmp_path / "drafter"), target_of(name)), tmp_path / "cache")
    config = AutoConfig.from_pretrained(view)
    assert [_get_dflash_layer_attention_params(config, layer) for layer in range(2)] == SEEN[name]


def test_dflash_qwen35_4b(tmp_path: Path) -> None:
    spec = read(tmp_path, DFLASH_QWEN35_4B)
    assert (spec.format, spec.gamma, spec.block_rows, spec.target_layer_ids[-1]) == ("z-lab", 15, 16, 29)
    assert spec.layer_types == ("sliding_attention",) * 5 + ("full_attention",)
    assert (spec.sliding_window, spec.is_causal) == (4096, None)


@pytest.mark.parametrize(("non_causal", "is_causal"), [(False, None), (True, False)])
def test_speculator_glm53(tmp_path: Path, non_causal: bool, is_causal: bool | None) -> None:
    spec = read(tmp_path, SPECULATOR_GLM53 | {"sliding_window_non_causal": non_causal})
    assert (spec.format, spec.gamma, spec.block_rows) == ("speculators", 8, 8)
    assert (spec.layer_types, spec.sliding_window) == (("sliding_attention",) * 3, 2048)
    assert spec.is_causal is is_causal


def test_windows_that_only_dflash_config_names(tmp_path: Path) -> None:
    """As NVIDIA exports them for vLLM: in every layer, though layer_types says otherwise, and in both directions."""
    nested = DFLASH_QWEN3_32B["dflash_config"] | {"use_swa": True, "swa_window_size": 1024}
    spec = read(tmp_path, DFLASH_QWEN3_32B | {"sliding_window": 2048, "dflash_config": nested})
    assert (spec.layer_types, spec.sliding_window) == (("sliding_attention",) * 10, 1024)
    assert spec.is_causal is False
    spec = read(tmp_path, DFLASH_QWEN3_32B | {"sliding_window": 2048, "dflash_config": nested | {"causal": True}})
    assert spec.is_causal is True


@pytest.mark.parametrize("first", [0, 1, 2, 5, None])
@pytest.mark.parametrize("used", [True, False])
def test_layers_without_types_are_those_of_transformers(tmp_path: Path, first: int | None, used: bool) -> None:
    said = {"use_sliding_window": used, "sliding_window": WINDOW, "max_window_layers": first}
    edit_config(tmp_path, "z-lab-dflash", layer_types=None, **said)
    usual = Qwen3Config(num_hidden_layers=2, **{name: value for name, value in said.items() if value is not None})
    spec = read_spec(tmp_path)
    assert list(spec.layer_types) == usual.layer_types
    assert spec.sliding_window == (usual.sliding_window if "sliding_attention" in usual.layer_types else None)


@pytest.mark.parametrize(
    ("kind", "said", "window"),
    [
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64}, 64),
        ("qwen3", {"use_sliding_window": True}, Qwen3Config(use_sliding_window=True).sliding_window),
        ("llama", {"sliding_window": 64}, 64),
    ],
)
def test_speculators_leave_out_the_usual_window(tmp_path: Path, kind: str, said: dict[str, Any], window: int) -> None:
    config = write_published(tmp_path / "written", TARGET, "speculators-dspark-after-anchor")
    layer = config["transformer_layer_config"] | {"model_type": kind, "layer_types": ["sliding_attention"] * 2} | said
    assert read(tmp_path, config | {"transformer_layer_config": layer}).sliding_window == window
