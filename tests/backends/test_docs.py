"""The files shown in docs/writing-a-backend.md, installed as a package and run; and the generated reference page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from moec.backends.docs import reference_markdown
from moec.backends.registry import all_backends

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "writing-a-backend.md"


def shown_files() -> dict[str, str]:
    """Every code block of the page that opens with ``# file: name``."""
    blocks = re.findall(r"```\w+\n(# file: (\S+)\n.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return {name: text for text, name in blocks}


def install(files: dict[str, str], into: Path) -> None:
    """What pip would leave behind: the modules, and the entry points of the pyproject in a dist-info folder."""
    for name, text in files.items():
        (into / name).write_text(text)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = into / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head)
    lines: list[str] = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run_pytest(folder: Path, installed: Path, arguments: list[str]) -> str:
    """The output of pytest in a new process that finds the package in ``installed``; it must pass."""
    env = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "MOEC_CACHE_DIR": str(installed / "cache")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    files = shown_files()
    assert set(files) == {
        "moec_dense.py", "pyproject.toml", "test_moec_dense.py", "test_moec_language.py", "moec_renormalize.py",
        "test_moec_renormalize.py",
    }  # fmt: skip
    assert "py-modules" in files["pyproject.toml"]
    install(files, tmp_path)
    found = ["test_moec_dense.py", "test_moec_language.py", "test_moec_renormalize.py"]
    assert "10 passed" in run_pytest(tmp_path, tmp_path, found)
    every = [str(ROOT / "tests/backends/test_every_backend.py"), "-k", "dense and (bits or status)"]
    assert " passed" in run_pytest(ROOT, tmp_path, every)


def test_the_reference_names_every_backend() -> None:
    text = reference_markdown()
    for name, backend in all_backends().items():
        assert f"### {name}\n" in text
        assert (type(backend).__doc__ or "").strip().split("\n")[0] in text
