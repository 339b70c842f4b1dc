"""The weights of a drafter: complete, of the right shapes, finite; read without running anything from the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dspark_serving.drafters.files import open_weights, tensor, weight_files
from dspark_serving.drafters.registry import canonical_names
from dspark_serving.drafters.spec import DrafterSpec
from dspark_serving.errors import CheckpointError

# Frozen copies of the target's own weights in a drafter without own ones: serving takes the target's.
TARGET_COPIES = ("embed_tokens.weight", "lm_head.weight")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(spec: DrafterSpec) -> Shapes:
    """Canonical name and shape of every weight of the drafter.

    Source: DeepSpec's modules; the canonical names are its own. Layers of Eagle3 take 2 * hidden_size inputs.
    """
    d = spec.hidden_size
    shapes: Shapes = {
        "fc.weight": (d, spec.num_features * spec.target_hidden_size),
        "norm.weight": (d,),
    }
    if spec.family != "eagle3":
        shapes["hidden_norm.weight"] = (d,)
    for i in range(spec.layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in _layer_shapes(spec).items()}
    if spec.own_head:
        shapes["lm_head.weight"] = (spec.head_rows, d)
    if spec.own_embedding:
        shapes["embed_tokens.weight"] = (spec.vocab_size, d)
    return shapes | _head_shapes(spec)


def _layer_shapes(spec: DrafterSpec) -> Shapes:
    d, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    wide = 2 * d if spec.family == "eagle3" else d
    shapes: Shapes = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (inner, d),
        "mlp.up_proj.weight": (inner, d),
        "mlp.down_proj.weight": (d, inner),
    }
    projections = {"q": (q, wide), "k": (kv, wide), "v": (kv, wide), "o": (d, q)}
    if spec.attention_k_eq_v:
        del projections["v"]
    for name, shape in projections.items():
        shapes[f"self_attn.{name}_proj.weight"] = shape
        if spec.attention_bias:
            shapes[f"self_attn.{name}_proj.bias"] = shape[:1]
    if spec.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (spec.head_dim,), "self_attn.k_norm.weight": (spec.head_dim,)}
    if spec.family == "eagle3":
        shapes["hidden_norm.weight"] = (d,)
    if spec.layer_kind == "gemma4":  # v_norm has no weight
        shapes |= {
            "pre_feedforward_layernorm.weight": (d,),
            "post_feedforward_layernorm.weight": (d,),
            "layer_scalar": (1,),
        }
    return shapes


def _head_shapes(spec: DrafterSpec) -> Shapes:
    """Markov and confidence heads."""
    d, rank = spec.hidden_size, spec.markov_rank
    shapes: Shapes = {}
    if rank:
        shapes |= {
            "markov_head.markov_w1.weight": (spec.vocab_size, rank),
            "markov_head.markov_w2.weight": (spec.head_rows, rank),
        }
        inner = {"gated": ("gate_proj", rank, d + rank), "rnn": ("joint_proj", 3 * rank, 2 * rank + d)}
        if spec.markov_head_type in inner:
            name, rows, columns = inner[spec.markov_head_type]
            shapes[f"markov_head.{name}.weight"] = (rows, columns)
            shapes[f"markov_head.{name}.bias"] = (rows,)
    if spec.has_confidence:
        shapes["confidence_head.proj.weight"] = (1, d + (rank if spec.confidence_with_markov else 0))
        shapes["confidence_head.proj.bias"] = (1,)
    return shapes


def check_weights(spec: DrafterSpec) -> None:
    """Read every weight once and compare with what the spec calls for.

    Raises:
        CheckpointError: no safetensors file, a damaged one, or weights that are missing, unknown, of another shape or
            type, or not finite; names every one of them.
    """
    problems = weight_problems(spec)
    if problems:
        raise CheckpointError(
            f"the weights of the drafter {spec.path} are not what its config.json calls for: {'; '.join(problems)}",
            expected=f"the {len(expected_shapes(spec))} weights of a {spec.family} drafter ({spec.format})",
            fix="Check that config.json and weights belong together, or export or copy the drafter again.",
        )


def weight_problems(spec: DrafterSpec) -> list[str]:
    """Every way in which the weights differ from what the spec calls for; empty when they agree.

    Raises:
        CheckpointError: the weights cannot be read at all: no safetensors file, or a damaged one.
    """
    expected = expected_shapes(spec)
    seen: set[str] = set()
    problems: list[str] = []
    for name, found in _loaded(spec, expected):
        if name in seen:
            problems.append(f"{name} is there twice")
        seen.add(name)
        problems += _tensor_problems(name, found, expected.get(name))
    missing = sorted(set(expected) - seen)
    return [f"{name} is missing (shape {list(expected[name])})" for name in missing] + problems


def weights_of(spec: DrafterSpec) -> dict[str, torch.Tensor]:
    """The weights that serving loads, by canonical name; `check_weights` says whether they are the right ones.

    Raises:
        CheckpointError: no safetensors file, or a damaged one.
    """
    return dict(_loaded(spec, expected_shapes(spec)))


def _loaded(spec: DrafterSpec, expected: Shapes) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical name and values of each weight that serving loads, one at a time."""
    rename = canonical_names(spec.format)
    for path in weight_files(spec.path):
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118
                canonical = rename(name)
                if canonical is not None and (canonical in expected or canonical not in TARGET_COPIES):
                    yield canonical, tensor(file, path, name)


def _tensor_problems(name: str, found: torch.Tensor, shape: tuple[int, ...] | None) -> list[str]:
    if shape is None:
        return [f"{name} ({list(found.shape)}) is unknown"]
    problems = []
    if tuple(found.shape) != shape:
        problems.append(f"{name} has the shape {list(found.shape)} instead of {list(shape)}")
    if found.dtype not in DTYPES:
        problems.append(f"{name} has the type {str(found.dtype).removeprefix('torch.')}")
    elif not bool(torch.isfinite(found).all()):
        problems.append(f"{name} holds values that are no finite numbers")
    return problems


def check_target_files(directory: Path) -> None:
    """Check that a target's safetensors files are all there and whole, by their headers; other formats are SGLang's.

    Raises:
        CheckpointError: there are no weights at all, a file of the index is missing, or one is damaged.
    """
    names = [path.name for path in directory.iterdir()]
    if not any("safetensors" in name for name in names) and any(name.endswith((".bin", ".gguf")) for name in names):
        return
    for path in weight_files(directory):
        open_weights(path)
