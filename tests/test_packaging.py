"""What is installed under which name, what is pinned, and who may import whom."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "dspark_serving": ROOT / "dspark_serving",
    "dspark_kernels": ROOT / "kernels" / "dspark_kernels",
    "dspark_training": ROOT / "training" / "dspark_training",
}
CORE = ("config.py", "errors.py", "scheduler", "drafters")
CORE_MAY_IMPORT = {*sys.stdlib_module_names, "torch", "numpy", "pydantic", "safetensors", "dspark_kernels"}
CORE_MODULES = tuple(f"dspark_serving.{name.removesuffix('.py')}" for name in CORE)


def imported_modules(source: str) -> set[str]:
    """Every absolute module name that a source imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


def sources(*places: Path) -> Iterator[Path]:
    for place in places:
        yield from sorted(place.rglob("*.py")) if place.is_dir() else [place]


def is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def output_of(*arguments: str, cwd: Path) -> str:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_installed_under_their_own_names(name: str, tmp_path: Path) -> None:
    found = output_of("-c", f"import {name}; print({name}.__path__[0])", cwd=tmp_path)
    assert Path(found) == PACKAGES[name]


def test_import_kernels_at_the_root_finds_the_pypi_package() -> None:
    """SGLang depends on the PyPI package `kernels`, and the repository has a directory of that name."""
    ours = output_of("-S", "-c", "import kernels; print(list(kernels.__path__))", cwd=ROOT)
    assert str(ROOT / "kernels") in ours, "the control: without site-packages, the directory is what is found"
    found = output_of("-c", "import kernels; print(kernels.__file__, kernels.get_kernel.__name__)", cwd=ROOT)
    assert re.search(r"site-packages/kernels/__init__\.py get_kernel$", found)


@pytest.mark.parametrize(
    ("group", "value"),
    [
        ("console_scripts", "dspark_serving.cli.main:app"),
        ("sglang.srt.plugins", "dspark_serving.sglang_adapter.plugin:load"),
        ("sglang.srt.platforms", "dspark_serving.sglang_adapter.cpu.standins:activate"),
    ],
)
def test_entry_points_are_registered_and_load(group: str, value: str) -> None:
    (entry_point,) = importlib.metadata.entry_points(group=group, name="dspark")
    assert entry_point.value == value
    assert callable(entry_point.load())


def test_version_is_the_packages() -> None:
    import dspark_serving

    assert importlib.metadata.version("dspark-serving") == dspark_serving.__version__


def test_only_the_adapter_imports_sglang() -> None:
    adapter = PACKAGES["dspark_serving"] / "sglang_adapter"
    importers = {
        path
        for path in sources(*PACKAGES.values())
        if any(is_below(m, "sglang") for m in imported_modules(path.read_text()))
    }
    assert importers, "the control: the adapter itself is found"
    assert [path for path in importers if not path.is_relative_to(adapter)] == []


def test_the_core_knows_no_framework() -> None:
    seen = 0
    for path in sources(*(PACKAGES["dspark_serving"] / name for name in CORE)):
        for module in imported_modules(path.read_text()):
            seen += 1
            known = module.split(".")[0] in CORE_MAY_IMPORT or any(is_below(module, core) for core in CORE_MODULES)
            assert known, f"{path.relative_to(ROOT)} imports {module}"
    assert seen


def test_nothing_imports_the_command_line() -> None:
    cli = PACKAGES["dspark_serving"] / "cli"
    for path in sources(*PACKAGES.values()):
        if not path.is_relative_to(cli):
            assert not any(is_below(m, "dspark_serving.cli") for m in imported_modules(path.read_text())), path


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import os\ndef f():\n    from sglang.srt import x\n    import sglang.y as z\nfrom . import own\n"
    assert imported_modules(source) == {"os", "sglang.srt", "sglang.y"}


def pins() -> list[tuple[str, str]]:
    lines = [
        line
        for name in ("cpu", "dev", "sglang")
        for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
        if line and not line.startswith(("#", "-c"))
    ]
    return [(name, version) for name, _, version in (line.partition("==") for line in lines)]


def test_every_requirement_is_pinned_and_installed_as_pinned() -> None:
    assert len(pins()) > 40
    for name, version in pins():
        assert importlib.metadata.version(name).split("+")[0] == version, name


@pytest.fixture
def check_machine() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_machine", ROOT / "requirements" / "check_machine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_install_refuses_another_python(check_machine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_machine.problem() is None
    monkeypatch.setattr(check_machine, "PYTHONS", ((3, 7),))
    assert re.match(r"Python 3\.1\d found; expected 3\.11 or 3\.12\..*make install PYTHON=", check_machine.problem())


def test_install_refuses_a_small_disk(check_machine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_machine, "FREE_GB", 1e9)
    assert re.match(r"\d+\.\d GB of disk free here; expected \d+ GB", check_machine.problem())
