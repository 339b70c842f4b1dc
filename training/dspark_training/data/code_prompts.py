"""Prompts of the form "complete this function", from any tree of Python sources."""

from __future__ import annotations

import ast
import random
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from dspark_serving.errors import DataError
from dspark_training.data.conversation import Prompt
from dspark_training.data.skipped import Skipped
from dspark_training.data.text import Duplicates

_DOC_LENGTHS = (40, 500)  # characters: shorter says too little, longer is a manual
_FORMS = (  # HumanEval asks in the first form
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```",
    "Complete the following Python function:\n```python\n{}```",
)


def code_prompts(directory: Path, skipped: Skipped, *, limit: int | None, seed: int) -> list[Prompt]:
    """One prompt for each documented public function with parameters; functions with near the same head once.

    Args:
        directory: searched for `*.py`; files in directories called `test` or `tests` are left out.
        skipped: takes files that are no Python.
        limit: prompts to return at most, drawn at random.

    Raises:
        DataError: there is no such function.
    """
    heads = []
    for path in sorted(directory.rglob("*.py")):
        if {"test", "tests"} & set(path.relative_to(directory).parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # other people's escape sequences
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError) as error:
            skipped.add("no Python", str(path), str(error))
            continue
        heads += list(_heads(tree))
    rng = random.Random(seed)
    rng.shuffle(heads)
    seen = Duplicates()
    chosen = [head for head in heads if seen.add(head) is None][:limit]
    if not chosen:
        raise DataError(
            f"no documented function in {directory}", expected="Python sources with docstrings", fix="Check the path."
        )
    return [Prompt.ask("code", rng.choice(_FORMS).format(head)) for head in chosen]


def _heads(tree: ast.Module) -> Iterator[str]:
    """Signature and docstring of every function that a reader could complete from them."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        doc = ast.get_docstring(node)
        if not doc or not _DOC_LENGTHS[0] <= len(doc) <= _DOC_LENGTHS[1]:
            continue
        arguments = node.args
        positional = arguments.posonlyargs or arguments.args
        if positional and positional[0].arg in ("self", "cls"):
            positional.pop(0)
        signature = ast.unparse(arguments)
        if not signature:
            continue
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        body = textwrap.indent(doc, "    ").lstrip()
        yield f'def {node.name}({signature}){returns}:\n    """ {body}\n    """\n'
