"""Drafters that cannot be served, or not with this target: refused by name, every difference named."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspark_serving.drafters import check_fit, check_weights, read_spec
from dspark_serving.errors import CheckpointError
from tests.published_formats import PUBLISHED, write_published
from tests.test_drafters_formats import GEMMA4, TARGET, edit_config, target_of

# (drafter, changed fields of its config.json, words of the refusal)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "quantised": ("z-lab-dflash", {"quantization_config": {"quant_method": "fp8"}}, "quantised .*fp8"),
    "quantised by NVIDIA": ("deepspec-dspark", {"quantization_config": {"quant_algo": "NVFP4"}}, "quantised .*NVFP4"),
    "experts": ("specforge-dspark", {"num_experts": 16}, "mixtures of experts"),
    "experts, nested": (
        "speculators-dspark",
        {"transformer_layer_config": {"num_local_experts": 8}},
        "mixtures of experts",
    ),
    "Gemma experts": ("deepspec-gemma4-dspark", {"enable_moe_block": True}, "mixtures of experts"),
    "EAGLE-1": ("llama-eagle3", {"architectures": ["LlamaForCausalLMEagle"]}, "EAGLE-1/2"),
    "EAGLE-1 speculator": ("speculators-eagle3", {"speculators_model_type": "eagle"}, "EAGLE-1/2"),
    "Medusa": ("llama-eagle3", {"architectures": ["MedusaModel"]}, "Medusa"),
    "P-EAGLE": ("speculators-eagle3", {"speculators_model_type": "peagle"}, "P-EAGLE"),
    "DFlash 2": ("z-lab-dflash", {"architectures": ["DFlash2DraftModel"]}, "DFlash 2"),
    "Domino": ("specforge-dflash", {"dflash_config": {"projector_type": "domino"}}, "Domino"),
    "latent attention": ("specforge-dspark", {"dflash_config": {"attention_mode": "mla"}}, "its attention is mla"),
    "unknown speculator": ("speculators-dflash", {"speculators_model_type": "novel"}, "novel"),
    "whole language model": (
        "deepspec-dspark",
        {"architectures": ["Qwen3ForCausalLM"]},
        "no drafter of a known format",
    ),
    "target with a drafter inside": (
        "deepspec-dspark",
        {"architectures": ["DeepseekV4ForCausalLM"], "dspark_block_size": 5},
        "a whole model with a drafter inside",
    ),
    "a window that transformers drops": (
        "z-lab-dflash-windowed",
        {"use_sliding_window": False},
        "use_sliding_window is not true",
    ),
    "a window of no size": ("z-lab-dflash-windowed", {"sliding_window": None}, "sliding_window is None"),
    "a window inside the block": ("z-lab-dflash-windowed", {"sliding_window": 4}, "window .* is 4, .* 5 rows"),
    "a window in Gemma 4's layers": (
        "deepspec-gemma4-dspark",
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 128, "use_sliding_window": True},
        "sliding window .*layer_types",
    ),
    "unknown attention": ("z-lab-dflash", {"layer_types": ["chunked_attention"] * 2}, "layer_types is .'chunked"),
    "attention sinks": ("z-lab-dflash", {"dflash_config": {"attention_sink_bias": True}}, "attention_sink_bias"),
    "scaled values": ("z-lab-dflash", {"dflash_config": {"attention_value_scale": 0.6}}, "attention_value_scale"),
    "scaled logits": ("z-lab-dflash", {"output_multiplier": 0.5}, "output_multiplier"),
    "norm before fc": ("speculators-eagle3", {"norm_before_fc": True}, "norm_before_fc"),
    "norms of each feature": ("llama-eagle3", {"fc_norm": True}, "fc_norm"),
    "two layers of Eagle3": ("llama-eagle3", {"num_hidden_layers": 2}, "num_hidden_layers is 2"),
    "embedding as feature": ("speculators-dspark", {"aux_hidden_state_layer_ids": [0, 1]}, r"target_layer_ids is \[-1"),
    "a block of the anchor alone": ("z-lab-dflash", {"block_size": 1}, "block_size is 1"),
    "feature layers missing": ("z-lab-dflash", {"dflash_config": {"mask_token_id": 3}}, "target_layer_ids is None"),
    "mask missing": ("z-lab-dflash", {"dflash_config": {"target_layer_ids": [0]}}, "mask_token_id is None"),
    "mask outside": (
        "z-lab-dflash",
        {"dflash_config": {"target_layer_ids": [0], "mask_token_id": 512}},
        "mask_token_id is 512",
    ),
    "confidence of a head that is not there": (
        "deepspec-dflash",
        {"enable_confidence_head": True},
        "without a Markov head",
    ),
    "reduced vocabulary without a table": ("specforge-dspark", {"draft_vocab_size": 100}, "draft_vocab_size is 100"),
    "table of another size": ("llama-eagle3", {"draft_vocab_size": 100}, r"d2t .* shape \[400\], not 100"),
    "more draft ids than ids": ("llama-eagle3", {"draft_vocab_size": 513}, "at most vocab_size"),
    "a billion layers": ("deepspec-dspark", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "a narrow drafter of a wide target": ("llama-eagle3", {"target_hidden_size": 64}, r"target_hidden_size \(64\)"),
    "unknown dspark_format": (
        "deepspec-dspark",
        {
            "architectures": ["DsparkServingBlockDrafter"],
            "family": "dspark",
            "layer_kind": "qwen3",
            "dspark_format": "x",
        },
        "dspark_format is 'x'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name(tmp_path: Path, case: str) -> None:
    name, fields, words = REFUSED[case]
    write_published(tmp_path, target_of(name), name)
    read_spec(tmp_path)  # the control: unchanged, it is read
    edit_config(tmp_path, name, **fields)
    with pytest.raises(CheckpointError, match=words) as refusal:
        read_spec(tmp_path)
    assert "\n" not in str(refusal.value)


def test_names_every_difference_to_the_target(tmp_path: Path) -> None:
    write_published(tmp_path, TARGET, "deepspec-dspark")
    spec = read_spec(tmp_path)
    check_fit(spec, TARGET)
    other = {"hidden_size": 64, "vocab_size": 600, "num_hidden_layers": 5, "eos_token_id": [7]}
    with pytest.raises(CheckpointError) as refusal:
        check_fit(spec, TARGET | other)
    for words in ("hidden size is 48", "vocabulary size is 512", "target layers is 4", r"tokens [511], the target's"):
        assert words in str(refusal.value)
    check_fit(spec, TARGET | {"eos_token_id": [7, 511]})  # a chat model ends its texts with more tokens than its base


def test_a_multimodal_target_counts_by_its_text(tmp_path: Path) -> None:
    write_published(tmp_path, GEMMA4, "deepspec-gemma4-eagle3")
    check_fit(read_spec(tmp_path), GEMMA4)
    with pytest.raises(CheckpointError, match="hidden size"):
        check_fit(read_spec(tmp_path), {"text_config": GEMMA4["text_config"] | {"hidden_size": 32}})


def test_layers_that_a_shallower_target_lacks_are_named(tmp_path: Path) -> None:
    write_published(tmp_path, TARGET, "llama-eagle3")
    with pytest.raises(CheckpointError, match=r"reads the layers \[2\], the target has 3"):
        check_fit(read_spec(tmp_path), TARGET | {"num_hidden_layers": 3})


def test_another_tokenizer_is_seen_where_both_have_one(tmp_path: Path) -> None:
    for side, text in (("drafter", "<mask>"), ("target", "<pad>")):
        (tmp_path / side).mkdir()
        added = [{"id": 510, "content": "<unk>"}, {"id": 511, "content": text}]
        (tmp_path / side / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    write_published(tmp_path / "drafter", TARGET, "z-lab-dflash")
    spec = read_spec(tmp_path / "drafter")
    check_fit(spec, TARGET)
    check_fit(spec, TARGET, tmp_path / "drafter")
    with pytest.raises(CheckpointError, match="calls token 511 '<mask>', the target's '<pad>'"):
        check_fit(spec, TARGET, tmp_path / "target")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats(allow_nan=True) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_config_is_more_than_a_refusal(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Any value in any field, nested ones too: read, or refused with a CheckpointError; never another exception."""
    config = write_published(tmp_path, target_of(name), name)
    field = data.draw(st.sampled_from(sorted(config)))
    if isinstance(config[field], dict) and config[field] and data.draw(st.booleans()):
        config[field] = config[field] | {data.draw(st.sampled_from(sorted(config[field]))): data.draw(VALUES)}
    else:
        config[field] = data.draw(VALUES)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(CheckpointError):
        check_weights(check_fit(read_spec(tmp_path), target_of(name)))
