"""Docs are true: generated parts are fresh, links lead somewhere, and code and commands run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moec import docs
from moec.cli.app import main
from moec.ir.parser import parse
from moec.ir.printer import print_graph
from moec.ir.verifier import verify
from moec.passes.base import PassContext
from moec.passes.manager import PassManager

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def blocks(language: str) -> list[pytest.param]:  # type: ignore[valid-type]
    """Code blocks of one language, in all pages."""
    found = []
    for page in PAGES:
        for i, (kind, text) in enumerate(_FENCE.findall(page.read_text(encoding="utf-8"))):
            if kind == language:
                found.append(pytest.param(text, id=f"{page.relative_to(ROOT)}:{i}"))
    return found


def test_generated_parts_are_fresh() -> None:
    assert docs.stale_pages() == [], "run `python -m moec.docs`"


def test_a_stale_page_is_noticed() -> None:
    page = "passes.md"
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert docs.render(page, text + "\nstray\n") == text
    with pytest.raises(ValueError, match="has no line"):
        docs.render(page, "no marker")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


# Blocks that open with a file's name belong together with others; tests/backends and tests/passes run those.
@pytest.mark.slow
@pytest.mark.parametrize("code", [b for b in blocks("python") if not str(b.values[0]).startswith("# file: ")])
def test_python_runs(code: str, tmp_path: Path) -> None:
    (tmp_path / "block.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "block.py")]
    made = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.mark.parametrize("text", blocks("console"))
def test_commands_run(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    commands = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "moec", "a console block holds moec commands; use sh for others"
        with pytest.raises(SystemExit) as stop:
            main(words[1:])
        shown = capsys.readouterr()
        assert not stop.value.code, shown.err
        assert shown.out


@pytest.mark.parametrize("text", blocks("moe"))
def test_ir_is_valid(text: str) -> None:
    for graph in parse(text, "<docs>"):
        verify(graph)


def test_the_readme_says_what_the_passes_do() -> None:
    (text,) = (p.values[0] for p in blocks("moe") if str(p.id).startswith("README"))
    before, after = parse(str(text), "README.md")
    PassManager("fuse-routing,fuse-experts,dce").run(before, PassContext())
    before.name = after.name
    assert _anonymous(print_graph(before)) == _anonymous(print_graph(after))


def _anonymous(text: str) -> str:
    names: dict[str, str] = {}
    return re.sub(r"%\w+", lambda m: names.setdefault(m.group(), f"%{len(names)}"), text)
