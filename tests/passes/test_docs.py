"""The files shown in docs/writing-a-pass.md, installed as a package and run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.passes.filecheck import read_cases, run_case

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "writing-a-pass.md"
CALL = "graph @g(%x: f32[T, 4]) -> f32[T, 4] {\n  return %x\n}\n"


def shown_files() -> dict[str, str]:
    """Every code block of the page that opens with ``# file: name``."""
    blocks = re.findall(r"```\w+\n(# file: (\S+)\n.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {name: text for text, name in blocks}


def run(*command: str, cwd: Path, installed: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=200
    )


def test_the_page_runs(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    files = shown_files()
    assert set(files) == {"moec_fold_scales.py", "pyproject.toml", "test_moec_fold_scales.py"}
    for name, text in files.items():
        (source / name).write_text(text, encoding="utf-8")
    offline = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    made = run("pip", "install", *offline, "--target", str(site), str(source), cwd=tmp_path, installed=site)
    assert made.returncode == 0, made.stderr
    assert (site / "moec_fold_scales.py").exists()
    made = run(
        "pytest", "-q", "-p", "no:cacheprovider", str(source), "--rootdir", str(source), cwd=site, installed=site
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert " passed" in made.stdout
    (tmp_path / "g.moe").write_text(CALL)
    made = run("moec", "opt", "g.moe", "-p", "fold-scales{duplicate=true}", cwd=tmp_path, installed=site)
    assert "return %x" in made.stdout, made.stderr


def test_the_filecheck_example_holds(tmp_path: Path) -> None:
    (text,) = re.findall(r"```text\n(// RUN.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    path = tmp_path / "canonicalize.moe"
    path.write_text(text, encoding="utf-8")
    cases = read_cases(path)
    assert [c.kind for c in cases] == ["positive", "negative"]
    for case in cases:
        run_case(case)
