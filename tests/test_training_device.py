"""The whole of training away from the CPU, on a pretended accelerator: the same numbers, nothing mixed up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dspark_training.config import FeaturesConfig
from dspark_training.data.conversation import Prompt
from dspark_training.evaluation.subjects import Ask, LocalSubject, WalkSubject, load_drafter
from dspark_training.target import Target, device_here
from safetensors.torch import load_file

from tests.pretended_device import OtherDeviceError, pretended_device
from tests.test_training_whole_run import prompt_file, recipe, run
from tests.tiny_models import make_tiny_target


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    make_tiny_target(tmp_path / "tiny", "llama")
    return tmp_path / "tiny"


def test_the_pretended_device_refuses_what_a_real_one_does() -> None:
    with pretended_device() as device:
        there, here = torch.ones(3, device=device), torch.ones(3)
        assert (there + there.cpu().to(device)).tolist() == [2, 2, 2]
        assert there[torch.tensor([1])].tolist() == [1]
        for wrong in (
            lambda: there + here,
            lambda: here[torch.tensor([1]).to(device)],
            lambda: there.numpy(),
            lambda: torch.multinomial(there, 1, generator=torch.Generator()),
        ):
            with pytest.raises((OtherDeviceError, RuntimeError, TypeError)):
                wrong()


def test_without_an_accelerator_everything_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert device_here() == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_here() == torch.device("cuda:3")


def decoded(target: Target, target_path: Path, bundle: Path) -> list[Any]:
    """Answers with a drafter, greedy and sampled, and the rounds of a walk over the greedy ones."""
    loaded = load_drafter(bundle, target, target_path)
    question = Prompt.ask("chat", "say a")
    ask = Ask(question, 0, list(question.messages))
    subject = LocalSubject("drafter", target, loaded, batch_size=2, seed=0)
    records = [record for heat in (0.0, 1.0) for part in subject.answer([ask], heat, 12) for record in part]
    walk = WalkSubject("drafter", target, loaded, lambda ask: records[0])
    records += [record for part in walk.answer([ask], 0.0, 12) for record in part]
    return [(record.answer_ids, record.accepted, record.verified) for record in records]


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # it is copied here
@pytest.mark.parametrize("algorithm", ["dspark", "dflash", "eagle3"])
def test_a_whole_run_away_from_the_cpu_gives_the_same_drafter(
    algorithm: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark_training.run.EVALUATION_TOKENS", 12)
    told = recipe(prompts=(prompt_file(tmp_path / "p.jsonl"),), greedy_share=0.5).model_copy(
        update={"algorithm": algorithm, "features": FeaturesConfig(source="cached")}
    )
    questions = [tmp_path / "p.jsonl"]
    run(told, Target.load(checkpoint), tmp_path / "cpu", questions)
    with pretended_device() as device:
        target = Target.load(checkpoint)
        target.model.to(device)
        assert target.device == device
        run(told, target, tmp_path / "there", questions)
        run(told, target, tmp_path / "there", questions)  # resumes at its end
    ours, theirs = (load_file(tmp_path / where / "bundle" / "model.safetensors") for where in ("there", "cpu"))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=2e-3, rtol=0.02)  # other kernels, and bfloat16 files
    expected = decoded(Target.load(checkpoint), checkpoint, tmp_path / "cpu" / "bundle")
    with pretended_device():
        assert decoded(target, checkpoint, tmp_path / "cpu" / "bundle") == expected
    facts = [
        json.loads((tmp_path / where / "bundle" / "training.json").read_text())["facts"] for where in ("there", "cpu")
    ]
    assert facts[0]["evaluation"] == facts[1]["evaluation"]
