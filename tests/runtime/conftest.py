"""Every test has its own cache directory and starts with empty tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moec.runtime import checks, counters, programs
from moec.runtime import ops as _ops  # noqa: F401  (registers torch.ops.moec)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path / "cache"))
    programs.clear()
    counters.reset()
    checks.reset()
    yield
    checks.set_mode("warn")
    programs.clear()
