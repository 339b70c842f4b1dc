"""config.json of drafters on the hub, field by field as published, read into what their authors say they are.

The hub cannot be reached from here: these are the fields that public code quotes from each repository.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dspark_serving.drafters import check_fit, read_spec
from dspark_serving.drafters.spec import DrafterSpec
from dspark_serving.drafters.weights import expected_shapes
from dspark_serving.errors import CheckpointError

# deepseek-ai/dspark_gemma4_12b_block7 at 2fa72e76
DSPARK_GEMMA4_12B: dict[str, Any] = {
    "architectures": ["Gemma4DSparkModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": True,
    "block_size": 7,
    "bos_token_id": 2,
    "confidence_head_with_markov": True,
    "dtype": "bfloat16",
    "enable_confidence_head": True,
    "enable_moe_block": False,
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3840,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 15360,
    "layer_types": ["full_attention"] * 5,
    "markov_head_type": "vanilla",
    "markov_rank": 256,
    "mask_token_id": 4,
    "max_position_embeddings": 262144,
    "model_type": "gemma4_text",
    "moe_intermediate_size": None,
    "num_anchors": 512,
    "num_attention_heads": 16,
    "num_experts": None,
    "num_global_key_value_heads": 1,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_kv_shared_layers": 0,
    "num_target_layers": 48,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "rope_theta": None,
        "rope_type": "default",
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 1024,
    "target_layer_ids": [5, 17, 29, 41, 46],
    "target_model_type": "gemma4_unified",
    "target_text_model_type": "gemma4_unified_text",
    "tie_word_embeddings": False,
    "use_double_wide_mlp": False,
    "vocab_size": 262144,
}
# SpecForge, configs/qwen3-8b-dspark.json
SPECFORGE_QWEN3_8B: dict[str, Any] = {
    "architectures": ["DSparkDraftModel"],
    "attention_bias": False,
    "auto_map": {"AutoModel": "dspark.DSparkDraftModel"},
    "block_size": 16,
    "bos_token_id": 151643,
    "dflash_config": {
        "mask_token_id": 151669,
        "target_layer_ids": [1, 9, 17, 25, 33],
        "projector_type": "dspark",
        "markov_rank": 256,
        "markov_head_type": "vanilla",
        "confidence_head_alpha": 1.0,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    },
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "layer_types": ["full_attention"] * 5,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "vocab_size": 151936,
}
# z-lab's DFlash drafters for Qwen3 (block 16), as SpecForge's configs/qwen3-32b-dflash.json repeats it
DFLASH_QWEN3_32B: dict[str, Any] = SPECFORGE_QWEN3_8B | {
    "architectures": ["DFlashDraftModel"],
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 8, 14, 21, 28, 34, 41, 48, 54, 61]},
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "layer_types": ["full_attention"] * 10,
    "num_attention_heads": 64,
    "num_hidden_layers": 10,
    "num_target_layers": 64,
}
# RedHatAI/gemma-4-31B-it-speculator.eagle3
SPECULATOR_GEMMA4_31B: dict[str, Any] = {
    "architectures": ["Eagle3DraftModel"],
    "draft_vocab_size": 32000,
    "dtype": "bfloat16",
    "eagle_aux_hidden_state_layer_ids": [2, 30, 57],
    "embed_requires_grad": False,
    "norm_before_fc": False,
    "norm_before_residual": True,
    "speculators_config": {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1}
        ],
        "verifier": {"architectures": [], "name_or_path": "google/gemma-4-31B-it"},
    },
    "speculators_model_type": "eagle3",
    "target_hidden_size": None,
    "transformer_layer_config": {
        "attention_bias": False,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "max_position_embeddings": 262144,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 1,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "vocab_size": 262144,
    },
}
# An early speculator: no sample_from_anchor, the draft length alone says that the anchor predicts nothing (GLM-5.2)
SPECULATOR_GLM: dict[str, Any] = {
    "speculators_model_type": "dspark",
    "block_size": 16,
    "markov_rank": 256,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "draft_vocab_size": 154880,
    "mask_token_id": 154856,
    "aux_hidden_state_layer_ids": [8, 23, 39, 55, 70],
    "speculators_config": {
        "algorithm": "dspark",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 15}],
    },
    "transformer_layer_config": {
        "model_type": "qwen3",
        "num_hidden_layers": 5,
        "hidden_size": 6144,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "head_dim": 64,
        "intermediate_size": 12288,
        "rms_norm_eps": 1e-05,
        "vocab_size": 154880,
        "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    },
}
# nebius/EAGLE3-gpt-oss-20b: named as an ordinary Llama
EAGLE3_GPT_OSS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "truncated_vocab_size": 64000,
    "draft_vocab_size": 64000,
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 11520,
    "vocab_size": 201088,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
}


def read(path: Path, config: dict[str, Any]) -> DrafterSpec:
    (path / "config.json").write_text(json.dumps(config))
    return read_spec(path)


def test_deepspec_gemma4_12b(tmp_path: Path) -> None:
    spec = read(tmp_path, DSPARK_GEMMA4_12B)
    assert (spec.family, spec.layer_kind, spec.gamma, spec.layers) == ("dspark", "gemma4", 7, 5)
    assert (spec.head_dim, spec.num_key_value_heads, spec.attention_k_eq_v) == (512, 1, True)
    assert (spec.rope["partial_rotary_factor"], spec.rope["rope_theta"]) == (0.25, 1000000.0)
    assert spec.target_layer_ids == (5, 17, 29, 41, 46)
    target = {
        "text_config": {"hidden_size": 3840, "vocab_size": 262144, "num_hidden_layers": 48, "eos_token_id": 1},
        "eos_token_id": [1, 106],
    }
    assert check_fit(spec, target) == spec


def test_specforge_qwen3_8b(tmp_path: Path) -> None:
    spec = read(tmp_path, SPECFORGE_QWEN3_8B)
    assert (spec.format, spec.family, spec.gamma, spec.anchor_predicts) == ("specforge", "dspark", 16, True)
    assert (spec.markov_rank, spec.has_confidence, spec.mask_token_id) == (256, True, 151669)
    assert spec.rope == {"rope_type": "default", "rope_theta": 1000000.0}


def test_dflash_qwen3_32b(tmp_path: Path) -> None:
    spec = read(tmp_path, DFLASH_QWEN3_32B)
    assert (spec.format, spec.family, spec.gamma, spec.anchor_predicts) == ("z-lab", "dflash", 15, False)
    assert expected_shapes(spec)["fc.weight"] == (5120, 10 * 5120)


def test_speculator_gemma4_31b(tmp_path: Path) -> None:
    save_file({"d2t": torch.arange(32000), "fc.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    spec = read(tmp_path, SPECULATOR_GEMMA4_31B)
    assert (spec.family, spec.layer_kind, spec.gamma) == ("eagle3", "llama", 3)
    assert (spec.norm_before_residual, spec.own_head, spec.own_embedding) == (True, True, False)
    assert spec.target_layer_ids == (1, 29, 56)
    assert spec.draft_token_ids == tuple(range(0, 64000, 2))


def test_speculator_that_tells_its_anchor_by_the_draft_length(tmp_path: Path) -> None:
    spec = read(tmp_path, SPECULATOR_GLM)
    assert (spec.gamma, spec.anchor_predicts, spec.own_head) == (15, False, False)
    assert spec.target_layer_ids == (7, 22, 38, 54, 69)


def test_block_speculators_have_norms_of_queries_and_keys_whatever_they_are_called(tmp_path: Path) -> None:
    """RedHatAI/Qwen3-30B-A3B-speculator.dflash says llama, and has q_norm and k_norm in every layer."""
    layer = SPECULATOR_GLM["transformer_layer_config"] | {"model_type": "llama"}
    spec = read(tmp_path, SPECULATOR_GLM | {"transformer_layer_config": layer})
    assert "layers.0.self_attn.q_norm.weight" in expected_shapes(spec)


@pytest.mark.parametrize("reduced", [True, False])
def test_an_eagle3_drafter_that_is_named_as_a_llama(tmp_path: Path, reduced: bool) -> None:
    save_file({"d2t": torch.arange(64000), "lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    if reduced:
        spec = read(tmp_path, EAGLE3_GPT_OSS)
        assert (spec.format, spec.family, spec.own_head, spec.target_layer_ids) == ("eagle3", "eagle3", True, ())
        assert (spec.rope["rope_type"], spec.rope["rope_theta"], spec.rope["factor"]) == ("yarn", 150000.0, 32.0)
    else:  # the control: a language model of one layer is no drafter
        with pytest.raises(CheckpointError, match="no drafter of a known format"):
            read(tmp_path, {key: value for key, value in EAGLE3_GPT_OSS.items() if key != "draft_vocab_size"})
