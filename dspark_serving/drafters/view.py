import hashlib
import json
from pathlib import Path

from dspark_serving.drafters.spec import DrafterSpec


def make_view(spec: DrafterSpec, root: Path) -> Path:
    config = json.loads((spec.path / "config.json").read_text())
    if config["architectures"] == ["DsparkServingBlockDrafter"]:
        return spec.path
    config |= {"architectures": ["DsparkServingBlockDrafter"], "family": spec.family, "layer_kind": "qwen3", "model_type": "qwen3", "dspark_format": "deepspec", "sample_from_anchor": True, "own_head": False, "own_embedding": False}
    view = root / "drafters" / hashlib.sha256((str(spec.path) + json.dumps(config)).encode()).hexdigest()[:16]
    view.mkdir(parents=True, exist_ok=True)
    (view / "config.json").write_text(json.dumps(config))
    for file in [*spec.path.glob("*.safetensors"), *spec.path.glob("draft_vocab.json"), *spec.path.glob("calibration.json")]:
        link = view / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
    return view
