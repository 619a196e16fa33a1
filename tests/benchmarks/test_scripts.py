"""Benchmarks are scripts: what they import is installed, or lies beside them."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
ELSEWHERE = {"matplotlib", "transformers", "triton"}
"""Of extras, which need not be here."""


def imported(file: Path) -> set[str]:
    """The first part of every module's name that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_what_a_script_imports_is_there_when_it_runs(file: Path) -> None:
    beside = {script.stem for script in SCRIPTS}
    for name in imported(file) - beside - ELSEWHERE:
        assert name not in ("benchmarks", "tests"), "the folder of a script is on the path, not the one above"
        assert importlib.util.find_spec(name) is not None, name
