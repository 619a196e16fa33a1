"""Every test compiles anew, keeps its programs to itself and starts with empty counters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moec.runtime import checks, counters


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    counters.reset()
    checks.reset()
    yield
    torch._dynamo.reset()
