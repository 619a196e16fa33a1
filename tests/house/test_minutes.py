"""``--minutes``: a test run that ends in time says what it left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEST = "tests/ir/test_parse_errors.py::test_exactly_one_graph"


@pytest.mark.parametrize(("minutes", "said"), [("0", "1 skipped"), ("-3", "1 skipped"), ("9", "1 passed")])
def test_what_would_begin_too_late_is_skipped_and_counted(minutes: str, said: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", f"--minutes={minutes}", TEST]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout
    assert ("would begin after" in done.stdout) == ("skipped" in said)
