"""Families that crash, hang or raise: each costs its row, and the others are measured all the same."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from moec.coverage.families import Family
from moec.coverage.pool import measure_all
from moec.coverage.row import Row
from moec.coverage.worker import serve

BAD = {
    "raises": 'print("{}")\nraise RuntimeError("no wheel for this /somewhere/deep/in/file.py\\nmore")',
    "dies": "import os\nos.abort()",
    "hangs": "import time\ntime.sleep(600)",
    "exits": "import os\nos._exit(3)",
}


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Family]:
    """Families that fail while their module is imported."""
    package = tmp_path / "bad_families"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name, text in BAD.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return {name: Family(name, f"bad_families.{name}", ("Experts",), (), ("Model",)) for name in BAD}


@pytest.mark.slow
def test_bad_families_cost_their_row_only(bad: dict[str, Family]) -> None:
    told: list[str] = []
    rows = measure_all(
        [bad["raises"], bad["dies"], bad["exits"], bad["raises"]],
        jobs=1,
        on_start=lambda f: told.append(f.name),
        on_row=lambda r: told.append(r.family.upper()),
    )
    assert [r.family for r in rows] == ["raises", "dies", "exits", "raises"]
    assert told == ["raises", "RAISES", "dies", "DIES", "exits", "EXITS", "raises", "RAISES"]
    assert rows[0].reasons == ["no small model: RuntimeError: no wheel for this file.py"]
    assert rows[1].reasons == ["its process died of SIGABRT"]
    assert rows[2].reasons == ["its process ended with exit code 3"]
    assert not any(r.whole or r.all_fused for r in rows)


@pytest.mark.slow
def test_a_family_that_hangs_is_stopped(bad: dict[str, Family], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.coverage.pool._START_LIMIT", 0.0)
    (row,) = measure_all([bad["hangs"]], jobs=2, limit=1.0)
    assert row.reasons == ["stopped: it took more than 1 seconds"]
    assert row.decorated


def test_the_worker_answers_line_by_line(bad: dict[str, Family]) -> None:
    asked = json.dumps({"family": bad["raises"].to_dict(), "backends": ["aten"]})
    answers = io.StringIO()
    serve(io.StringIO(f"{asked}\n"), answers)
    first, last = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert Row.from_dict(first["row"]).family == "raises"
    assert last == {"done": True}
