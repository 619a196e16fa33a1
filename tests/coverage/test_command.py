"""``moec coverage`` on the command line, with the measuring left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from moec.cli.app import main
from moec.coverage.families import Family
from moec.coverage.row import Row


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["coverage", *args])
    return int(stop.value.code or 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asks to be measured."""
    seen: dict[str, Any] = {}

    def measure_all(
        families: Sequence[Family],
        *,
        on_start: Callable[[Family], None],
        on_row: Callable[[Row], None],
        **options: Any,
    ) -> list[Row]:
        seen.update(options, names=[f.name for f in families])
        rows = [Row(f.name, bool(f.decorated), found=2, fused=2, reasons=["made up"]) for f in families]
        for family, row in zip(families, rows, strict=True):
            on_start(family)
            on_row(row)
        return rows

    monkeypatch.setattr("moec.coverage.pool.measure_all", measure_all)
    return seen


def test_table_files_and_summary(asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--json", str(tmp_path / "c.json"), "--markdown", str(tmp_path / "c.md"))
    assert run("--families", "mixtral,llama4", "--jobs", "3", "--backends", "aten", *files) == 0
    assert asked == {"names": ["mixtral", "llama4"], "jobs": 3, "backends": ("aten",)}
    shown = capsys.readouterr().out
    assert "mixtral: made up" in shown
    assert "1 of 1 decorated families fused" in shown.splitlines()[-2]
    stored = json.loads((tmp_path / "c.json").read_text())
    assert [r["family"] for r in stored["families"]] == ["mixtral", "llama4"]
    assert len(stored["summary"]) == 2
    assert "| mixtral [1] |" in (tmp_path / "c.md").read_text()


def test_a_part(asked: dict[str, Any]) -> None:
    names = []
    for part in ("1/2", "2/2"):
        assert run("--part", part) == 0
        names += asked["names"]
    assert len(names) == len(set(names)) >= 72


def test_what_cannot_be_asked(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for args in (("--families", "mixtrall"), ("--part", "3/2"), ("--backends", "cpuu")):
        assert run(*args) == 2
        assert capsys.readouterr().err.startswith("error[")
    assert not asked
