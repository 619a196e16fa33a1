"""House rules that a reader would otherwise have to check by eye."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from moec.doctor import EXTRAS, PYTHON_FROM, TORCH_BELOW, TORCH_FROM

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("ir", "passes", "backends", "moec")
ALLOWED = {
    "ir": ("ir",),
    "passes": ("ir", "passes"),
    "backends": ("ir", "passes", "backends", "cache", "cost", "targets"),
    "moec/cost": ("ir", "cache", "cost", "targets"),
}
LONGEST_FILE = 400
# Spelt in pieces, so that this file does not contain what it looks for.
FOREIGN = re.compile(
    "|".join(["/wor" + "k/", "/ro" + "ot/", "/tm" + "p/", r"py" + r"pi\.org", "download" + r"\.pytorch"])
)


def sources(room: str) -> list[Path]:
    return [p for p in sorted((ROOT / room).rglob("*.py")) if not any(f.is_symlink() for f in p.parents)]


def imports(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found += [node.module or ""] if node.module != "moec" else [f"moec.{a.name}" for a in node.names]
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_knows_only_the_rooms_below(room: str) -> None:
    for path in sources(room):
        for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if name == "moec" or name.startswith("moec."):
                assert name.partition(".")[2].split(".")[0] in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", [*ROOMS, "tests", "examples"])
def test_files_are_documented_and_short(room: str) -> None:
    for path in sources(room):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        assert text.count("\n") <= LONGEST_FILE, f"{name} has grown past {LONGEST_FILE} lines"
        if text and path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(text)), f"{name} does not say what it is"


def committed() -> list[Path]:
    made = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip("not a git checkout")
    return [p for name in made.stdout.splitlines() if (p := ROOT / name).is_file() and not p.is_symlink()]


def test_no_file_names_a_machine() -> None:
    for path in committed():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = FOREIGN.search(text)
        assert not found, f"{path.relative_to(ROOT)} holds {found.group() if found else ''}"


def test_the_torch_range_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch_range,) = (d for d in project["dependencies"] if d.startswith("torch"))
    assert torch_range == f"torch>={TORCH_FROM[0]}.{TORCH_FROM[1]},<{TORCH_BELOW[0]}.{TORCH_BELOW[1]}"
    assert project["requires-python"] == f">={PYTHON_FROM[0]}.{PYTHON_FROM[1]}"
    assert set(EXTRAS) | {"test", "dev"} == set(project["optional-dependencies"])


def test_the_readme_shows_what_matters_first() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first = "\n".join(lines[:41])
    assert "```python" in first
    assert "graph @before" in first
    assert "graph @after" in first
    assert first.count("```") == 4


def test_ci_runs_the_readme_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^python3 -m venv .* && (\S+ -m pytest.*)$", readme, re.MULTILINE)
    assert len(found) == 1
    assert "README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
