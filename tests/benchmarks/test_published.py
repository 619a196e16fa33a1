"""The page of published measurements: every row is there, with its published number, and predictions are today's."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moec.simulate import known_topologies

ROOT = Path(__file__).resolve().parents[2]
DATA: dict[str, Any] = json.loads((ROOT / "benchmarks" / "published.json").read_text())
MOST_RANKS = 8  # of rows that are predicted in the quick tests
MEANS = ("fsmoe", "pipelining_gain")  # over many layers
CELLS = re.compile(r"^\| (.*?) \| ([\d.e+]+) (\S+) \| ([\d.e+]+) \S+ \| [-+]\d+% \| (.*) \|$", re.MULTILINE)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("published")


def cells() -> dict[tuple[str, str], tuple[float, str, float]]:
    """(what, source): published number, unit, predicted number."""
    text = (ROOT / "docs" / "simulator.md").read_text()
    return {(m[0], m[4]): (float(m[1]), m[2], float(m[3])) for m in CELLS.findall(text)}


def test_every_row_is_on_the_page() -> None:
    rows = DATA["rows"]
    assert len(rows) == len({r["id"] for r in rows}) == len(cells()) >= 8
    for row in rows:
        number, unit, _ = cells()[row["what"], row["source"]]
        assert number == pytest.approx(row["measured"], rel=1e-3)
        assert unit == row["unit"].replace("ratio", "x")
        assert row["predict"]["topology"] in known_topologies()


@pytest.mark.parametrize(
    "row",
    [r for r in DATA["rows"] if r["predict"].get("ranks", 1) <= MOST_RANKS and r["predict"]["kind"] not in MEANS],
    ids=lambda r: r["id"],
)
def test_predictions_are_todays(row: dict[str, Any], published: ModuleType) -> None:
    assert published.predict(row) == pytest.approx(cells()[row["what"], row["source"]][2], rel=1e-3)


@pytest.mark.slow
def test_the_page_is_what_would_be_written(published: ModuleType) -> None:
    assert published.main(["--check"]) == 0


def test_a_page_that_is_not_is_told_of(published: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{published.BEGIN}\nold\n{published.END}\nafter\n")
    monkeypatch.setattr(published, "PAGE", page)
    few = ["--only", "flux-gemm"]
    assert published.main([*few, "--check"]) == 1
    assert published.main([*few, "--write"]) == 0
    assert published.main([*few, "--check"]) == 0
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
