"""Options, version check, refusals and defaults of the plugin, without a server."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dspark_serving.config import ServingConfig, load_config
from dspark_serving.drafters import read_spec
from dspark_serving.errors import CheckpointError, DataError, EnvironmentMismatchError, OptionError
from dspark_serving.scheduler.survival_map import SurvivalMap
from dspark_serving.sglang_adapter import options, plugin, resolution
from dspark_serving.sglang_adapter.cpu.standins import has_accelerator
from tests.tiny_blocks import DFLASH, make_tiny_block
from tests.tiny_models import make_tiny_drafter, make_tiny_target


def parse(*arguments: str) -> ServingConfig:
    parser = argparse.ArgumentParser()
    options.add_cli_args(parser)
    return options.attach(SimpleNamespace(), parser.parse_args(arguments))


def test_options_come_from_flag_then_variable_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse() == ServingConfig(policy="adaptive", threshold=0.3, disable=False)
    monkeypatch.setenv("DSPARK_POLICY", "off")
    monkeypatch.setenv("DSPARK_THRESHOLD", "0.5")
    assert parse() == ServingConfig(policy="off", threshold=0.5)
    assert parse("--dspark-policy", "threshold", "--dspark-disable") == ServingConfig(
        policy="threshold", threshold=0.5, disable=True
    )


def test_an_engine_without_command_line_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_POLICY", "off")
    assert options.config_of(SimpleNamespace()).policy == "off"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"policy": "best"}, "policy"),
        ({"threshold": "1.5"}, "threshold"),
        ({"threshold": "much"}, "threshold"),
        ({"speed_floor": "inf"}, "speed-floor"),
        ({"profile_seconds": "nan"}, "profile-seconds"),
    ],
)
def test_a_bad_option_names_flag_and_variable(given: dict[str, str], name: str) -> None:
    with pytest.raises(OptionError, match=f"--dspark-{name}") as refusal:
        load_config(given, {})
    assert f"DSPARK_{name.upper().replace('-', '_')}" in str(refusal.value)


@pytest.mark.parametrize("version", ["0.5.22", "0.5.24", "0.6.0"])
def test_refuses_other_versions_of_sglang(version: str) -> None:
    with pytest.raises(
        EnvironmentMismatchError, match=rf"SGLang {version} is installed; expected a version >=0\.5\.23"
    ):
        plugin.check_sglang_version(version)


def test_accepts_patches_of_the_supported_version() -> None:
    plugin.check_sglang_version("0.5.23")
    plugin.check_sglang_version("0.5.23.post1")


SERVE_WITH_BROKEN_PLUGIN = """
import importlib.metadata, types
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.9.0" if name == "sglang" else real(name)
from sglang.srt.plugins import load_plugins
load_plugins()  # logs the failure and goes on
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
SpeculativeAlgorithm.from_string({name!r}).{method}(types.SimpleNamespace(speculative_algorithm={name!r}))
"""


@pytest.mark.parametrize(
    ("name", "method"),
    [("DSPARK", "handle_server_args"), ("DFLASH", "create_worker"), ("EAGLE3", "handle_server_args")],
)
def test_stock_code_does_not_serve_under_our_names(name: str, method: str) -> None:
    code = SERVE_WITH_BROKEN_PLUGIN.format(name=name, method=method)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("dspark: error: SGLang 0.9.0 is installed; expected a version >=0.5.23,<0.5.24")


def test_an_unexpected_failure_keeps_its_reason() -> None:
    error = plugin._as_dspark_error(ImportError("no module named torch"))
    assert "ImportError: no module named torch" in str(error)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    make_tiny_target(path)
    return path


@pytest.fixture
def drafter(tmp_path: Path, target: Path) -> Path:
    make_tiny_drafter(tmp_path, resolution.target_config(str(target)), confidence=False)
    return tmp_path


@pytest.fixture(autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = dict(os.environ)
    os.environ["DSPARK_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.clear()
    os.environ.update(before)


def server_args(target: Path, drafter: Path | None, algorithm: str = "dspark", **fields: Any) -> Any:
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(
        model_path=str(target),
        speculative_algorithm=algorithm,
        speculative_draft_model_path=None if drafter is None else str(drafter),
        **fields,
    )


def resolved(args: Any, name: str) -> Any:
    from sglang.srt.arg_groups.overrides import resolution_result

    return resolution_result(args, name)


def test_no_drafter_path(target: Path) -> None:
    with pytest.raises(OptionError, match="no drafter is given"):
        resolution.prepare(server_args(target, None), ServingConfig())


@pytest.mark.parametrize("family", ["dspark", "dflash"])
def test_every_family_runs_in_the_dspark_worker_from_a_view(target: Path, tmp_path: Path, family: str) -> None:
    drafter = make_tiny_block(
        tmp_path / "drafter", resolution.target_config(str(target)), **(DFLASH if family == "dflash" else {})
    )
    args = server_args(target, drafter, family.title())
    resolution.prepare(args, ServingConfig())
    assert resolved(args, "speculative_algorithm") == "DSPARK"
    view = Path(resolved(args, "speculative_draft_model_path"))
    assert view.is_relative_to(os.environ["DSPARK_CACHE"])
    assert read_spec(view).family == family


@pytest.mark.parametrize("asked", ["dflash", "EAGLE3"])
def test_a_drafter_of_another_family_is_refused_with_the_right_flag(target: Path, drafter: Path, asked: str) -> None:
    with pytest.raises(OptionError, match=f"{asked.lower()} .*; expected --speculative-algorithm dspark "):
        resolution.prepare(server_args(target, drafter, asked), ServingConfig())


@pytest.mark.parametrize("algorithm", ["NGRAM", "EAGLE", "nextn"])
def test_other_algorithms_are_left_alone(target: Path, algorithm: str) -> None:
    args = server_args(target, None, algorithm)
    resolution.prepare(args, ServingConfig())
    assert resolved(args, "speculative_algorithm") == algorithm


def test_a_target_that_cannot_show_its_layers_is_refused_by_name(target: Path, drafter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(target, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["StableLmForCausalLM"]}))
    with pytest.raises(CheckpointError, match=r"StableLmForCausalLM\) cannot show the outputs of its layers"):
        resolution.prepare(server_args(other, drafter), ServingConfig())


def test_missing_target(tmp_path: Path, drafter: Path) -> None:
    with pytest.raises(CheckpointError, match="target model directory"):
        resolution.prepare(server_args(tmp_path / "nowhere", drafter), ServingConfig())


def test_a_drafter_without_confidence_head_is_scheduled_like_any_other(target: Path, drafter: Path) -> None:
    resolution.prepare(server_args(target, drafter), ServingConfig(policy="threshold"))
    assert os.environ[resolution.RAGGED_MODE] == "compact"


def test_temperatures_for_a_head_that_is_not_there_are_refused(target: Path, drafter: Path) -> None:
    args = server_args(target, drafter, speculative_dspark_confidence_sts_path="sts.json")
    with pytest.raises(OptionError, match=r"no confidence head; expected --dspark-calibration"):
        resolution.prepare(args, ServingConfig())


def test_temperatures_for_a_head_that_a_survival_map_replaces_are_refused(target: Path, tmp_path: Path) -> None:
    make_tiny_drafter(headed := tmp_path / "headed", resolution.target_config(str(target)))
    given = {"speculative_dspark_confidence_sts_path": "sts.json"}
    resolution.prepare(server_args(target, headed, **given), ServingConfig())
    SurvivalMap.default(read_spec(headed).gamma).save(headed / "survival_map.json")
    with pytest.raises(OptionError, match=r"survival_map.json judges; expected --dspark-calibration"):
        resolution.prepare(server_args(target, headed, **given), ServingConfig())


def test_a_survival_map_for_another_block_size_is_refused(target: Path, drafter: Path) -> None:
    SurvivalMap.default(7).save(drafter / "survival_map.json")
    with pytest.raises(DataError, match="is for block size 7"):
        resolution.prepare(server_args(target, drafter), ServingConfig())


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"disaggregation_mode": "decode"}, "--disaggregation-mode is decode; expected null"),
        ({"enable_dp_attention": True}, "--enable-dp-attention is True"),
        ({"pp_size": 2}, "--pp-size is 2; expected 1"),
        ({"speculative_dspark_block_size": 1}, "--speculative-dspark-block-size is 1, .* drafts 4 tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_plan_of_a_round_does_not_reach_is_refused(
    target: Path, drafter: Path, fields: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(OptionError, match=complaint):
        resolution.prepare(server_args(target, drafter, **fields), ServingConfig())


@pytest.mark.skipif(has_accelerator(), reason="with an accelerator SGLang's ranks share the work")
@pytest.mark.parametrize("family", ["dspark", "eagle3"])
def test_several_ranks_on_a_cpu_are_refused(target: Path, drafter: Path, family: str) -> None:
    with pytest.raises(OptionError, match="--tp-size is 2 without an accelerator; expected 1"):
        resolution.prepare(server_args(target, drafter, family, tp_size=2), ServingConfig())


def test_recordings_that_could_not_be_written_are_refused_at_start(target: Path, drafter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=r"--dspark-recording .*file: .*; expected a directory that"):
        resolution.prepare(server_args(target, drafter), ServingConfig(recording=tmp_path / "file"))


@pytest.mark.skipif(has_accelerator(), reason="defaults of a machine without accelerator")
def test_cpu_defaults_fill_only_what_is_unset(target: Path, drafter: Path) -> None:
    args = server_args(target, drafter, max_total_tokens=4096)
    resolution.prepare(args, ServingConfig())
    assert [resolved(args, name) for name in ("device", "attention_backend", "max_total_tokens", "dtype")] == [
        "cpu",
        "torch_native",
        4096,
        "float32",
    ]


@pytest.mark.skipif(has_accelerator(), reason="with an accelerator SGLang's own DSPARK serves")
def test_disable_serves_without_speculation_on_cpu(target: Path, tmp_path: Path) -> None:
    args = server_args(target, tmp_path / "no drafter is read")
    resolution.prepare(args, ServingConfig(disable=True))
    assert resolved(args, "speculative_algorithm") is None
    assert os.environ["DSPARK_DISABLE"] == "1"


@pytest.mark.skipif(has_accelerator(), reason="with an accelerator SGLang's own decoding serves all of them")
def test_disable_leaves_eagle3_to_sglang(target: Path, tmp_path: Path) -> None:
    args = server_args(target, tmp_path / "no drafter is read", "EAGLE3")
    resolution.prepare(args, ServingConfig(disable=True))
    assert resolved(args, "speculative_algorithm") == "EAGLE3"


def test_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(EnvironmentMismatchError, match=r"cannot listen on 127\.0\.0\.1"):
            resolution.check_port("127.0.0.1", other.getsockname()[1])
