"""What the measurements of this repository compare; no server is launched."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import first_light, scheduler_sweep
from benchmarks.subjects import DATASETS
from dspark_serving.assets import shipped_bundle
from dspark_serving.bench.arms import Arm, Attached
from dspark_serving.bench.workload import read_prompts

TARGET = Path("target")


def test_every_prompt_file_is_enough_for_the_highest_concurrency() -> None:
    for dataset in DATASETS.values():
        assert dataset.path is not None
        prompts = read_prompts(dataset.path)
        assert len(set(prompts)) == len(prompts) >= 32


def test_first_light_compares_servers() -> None:
    arms = first_light.arms_of(TARGET, shipped_bundle())
    assert len({(arm.host, arm.policy) for arm in arms.values()}) == len(arms)
    assert {name: arm.family for name, arm in arms.items() if arm.family} == {
        "dspark": "dspark", "static": "dspark", "ngram": "ngram",
    }  # fmt: skip


def test_scheduler_sweep_compares_policies_of_one_server() -> None:
    arms = scheduler_sweep.arms_of(TARGET, shipped_bundle(), 32)
    ngram = arms.pop("ngram")
    assert len({arm.host for arm in arms.values()}) == 1
    assert ngram.host not in {arm.host for arm in arms.values()}
    assert ngram.greedy_only
    assert {arm.policy.policy for arm in arms.values() if arm.policy} == {
        "off", "full", "threshold", "native", "adaptive",
    }  # fmt: skip
    assert set(arms) == {*scheduler_sweep.RIVALS, scheduler_sweep.CANDIDATE}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--arms", "dspark,ngram"], "there is no arm 'off'"),
        (["--arms", "off,dspork"], "names 'dspork'"),
        (["--concurrency", "1,many"], "--concurrency 1,many"),
        (["--dtype", "fp8"], "--dtype fp8"),
    ],
)
def test_unusable_options_are_refused_in_one_line(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {name: Arm(name, Attached("http://a")) for name in ("off", "plain", "dspark", "ngram")}
    monkeypatch.setattr(first_light, "arms_of", lambda target, drafter: arms)
    monkeypatch.setattr(first_light, "shipped_bundle", lambda: Path("drafter"))
    monkeypatch.setattr(first_light, "ensure_smollm2", lambda dtype, report: TARGET)
    app = Typer()
    app.command()(first_light.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert "Traceback" not in result.output
