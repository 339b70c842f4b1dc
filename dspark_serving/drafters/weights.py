"""The weights of a drafter: complete, of the right shapes, finite; read without running anything from the file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dspark_serving.drafters.spec import DrafterSpec, read_json_object
from dspark_serving.errors import CheckpointError

# Frozen copies of the target's own weights: DeepSpec stores them, serving takes the target's.
IGNORED = ("embed_tokens.weight", "lm_head.weight")


def canonical_names(format_name: str):
    return lambda name: None if name in IGNORED else name.removeprefix("model.")


def expected_shapes(spec: DrafterSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the drafter, by DeepSpec's names."""
    d, q, kv = spec.hidden_size, spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    rank, vocab = spec.markov_rank, spec.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (d, len(spec.target_layer_ids) * d),
        "hidden_norm.weight": (d,),
        "norm.weight": (d,),
    }
    if rank:
        shapes |= {"markov_head.markov_w1.weight": (vocab, rank), "markov_head.markov_w2.weight": (vocab, rank)}
    for i in range(spec.layers):
        layer = f"layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (d,),
            f"{layer}.post_attention_layernorm.weight": (d,),
            f"{layer}.mlp.gate_proj.weight": (spec.intermediate_size, d),
            f"{layer}.mlp.up_proj.weight": (spec.intermediate_size, d),
            f"{layer}.mlp.down_proj.weight": (d, spec.intermediate_size),
        }
        if spec.layer_kind != "llama":
            shapes |= {f"{layer}.self_attn.{n}_norm.weight": (spec.head_dim,) for n in "qk"}
        if spec.layer_kind == "gemma4":
            shapes |= {f"{layer}.{n}_feedforward_layernorm.weight": (d,) for n in ("pre", "post")}
            shapes[f"{layer}.layer_scalar"] = (1,)
        for name, shape in {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}.items():
            if name == "v" and spec.layer_kind == "gemma4":
                continue
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = shape
            if spec.attention_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = shape[:1]
    head = {"gated": ("gate_proj", rank, d + rank), "rnn": ("joint_proj", 3 * rank, 2 * rank + d)}
    if rank and spec.markov_head_type in head:
        name, rows, columns = head[spec.markov_head_type]
        shapes[f"markov_head.{name}.weight"] = (rows, columns)
        shapes[f"markov_head.{name}.bias"] = (rows,)
    if spec.has_confidence:
        shapes["confidence_head.proj.weight"] = (1, d + (rank if spec.confidence_with_markov else 0))
        shapes["confidence_head.proj.bias"] = (1,)
    return shapes


def check_weights(spec: DrafterSpec) -> None:
    """Read every weight once and compare with what the spec calls for.

    Raises:
        CheckpointError: no safetensors file, a damaged one, or a weight that is missing, unknown, of another shape or
            not finite; names the file or the weight.
    """
    expected = expected_shapes(spec)
    seen: set[str] = set()
    for path in weight_files(spec.path):
        for name, tensor in _read(path):
            if name in IGNORED:
                continue
            seen.add(name)
            _check_tensor(path, name, tensor, expected.get(name))
    missing = sorted(set(expected) - seen)
    if missing:
        raise CheckpointError(
            f"the drafter {spec.path} lacks {_some(missing)}",
            expected="every weight that its config.json calls for",
            fix="Export or copy the drafter again.",
        )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or those that its index names.

    Raises:
        CheckpointError: there are none; says so when the weights are there in a format that can run code.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        named = read_json_object(index, "an index of safetensors files").get("weight_map", {})
        files = [directory / name for name in sorted(set(named.values()))]
    else:
        files = [directory / "model.safetensors"]
    absent = [path for path in files if not path.is_file()]
    if not absent:
        return files
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))
    raise CheckpointError(
        f"{absent[0]} does not exist" + (f", only pickled weights ({_some(pickled)})" if pickled else ""),
        expected="weights as safetensors; pickled ones can run code and are never loaded",
        fix="Convert the weights to safetensors." if pickled else "Copy the checkpoint again.",
    )


def check_target_files(directory: Path) -> None:
    """Check that a target's safetensors files are all there and whole, by their headers; other formats are SGLang's.

    Raises:
        CheckpointError: there are no weights at all, a file of the index is missing, or one is damaged.
    """
    names = [path.name for path in directory.iterdir()]
    if not any("safetensors" in name for name in names) and any(name.endswith((".bin", ".gguf")) for name in names):
        return
    for path in weight_files(directory):
        _open_whole(path)


def _read(path: Path) -> list[tuple[str, torch.Tensor]]:
    with _open_whole(path) as file:
        return [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118


def _open_whole(path: Path) -> safe_open:
    """Open a safetensors file; its header is checked against the file's size."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error})", expected="a complete safetensors file", fix="Copy the checkpoint again."
        ) from error


def _check_tensor(path: Path, name: str, tensor: torch.Tensor, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        raise CheckpointError(
            f"{path} holds an unknown weight {name}",
            expected="the weights that its config.json calls for and no others",
            fix="Check that config.json and weights belong together.",
        )
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{path}: {name} has the shape {list(tensor.shape)}",
            expected=f"{list(shape)} by its config.json",
            fix="Check that config.json and weights belong together.",
        )
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{path}: {name} holds values that are no finite numbers",
            expected="finite floating-point weights",
            fix="Export the drafter again from an earlier training step.",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
