"""Installs three import packages: dspark_serving, dspark_kernels (in kernels/) and dspark_training (in training/)."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def requirements(name: str) -> list[str]:
    """The requirement lines of requirements/<name>.txt, without comments and pip options."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def version() -> str:
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "dspark_serving" / "__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError('dspark_serving/__init__.py has no line __version__ = "..."')
    return found.group(1)


setup(
    name="dspark-serving",
    version=version(),
    description="Online speculative decoding with DSpark drafters, as a plugin of SGLang",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11,<3.13",
    packages=[
        *find_packages(include=["dspark_serving", "dspark_serving.*"]),
        *find_packages("kernels"),
        *find_packages("training"),
    ],
    package_dir={"dspark_kernels": "kernels/dspark_kernels", "dspark_training": "training/dspark_training"},
    package_data={"dspark_training": ["recipes/*.json", "recipes/*/*.json"]},
    # The shipped drafters: an installation without the repository finds them under sys.prefix.
    data_files=[
        (
            f"share/dspark-serving/bundles/{folder.relative_to(ROOT / 'examples' / 'bundles')}",
            sorted(str(file.relative_to(ROOT)) for file in folder.iterdir() if file.is_file()),
        )
        for folder in sorted((ROOT / "examples" / "bundles").rglob("*"))
        if folder.is_dir()
    ],
    install_requires=[
        "filelock",
        "gguf",
        "httpx",
        "matplotlib",
        "numpy",
        "prometheus-client",
        "pydantic>=2",
        "rich",
        "safetensors",
        "torch",
        "transformers>=5",
        "typer",
    ],
    extras_require={
        # Without an accelerator: these pins, then `pip install --no-deps -r requirements/sglang.txt` (see Makefile).
        "cpu": requirements("cpu"),
        "cuda": requirements("sglang"),
        "train": ["accelerate", "datasets", "openai", "tensorboard"],
        "dev": requirements("dev"),
    },
    entry_points={
        "console_scripts": ["dspark = dspark_serving.cli.main:app"],
        "sglang.srt.plugins": ["dspark = dspark_serving.sglang_adapter.plugin:load"],
        "sglang.srt.platforms": ["dspark = dspark_serving.sglang_adapter.cpu.standins:activate"],
    },
)
