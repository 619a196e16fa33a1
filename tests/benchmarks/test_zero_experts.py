"""``benchmarks/zero_experts.py`` runs, and its rows and FLOPs are those of the slots that have an expert."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moec.backends.cpu.build import compiler
from moec.backends.cpu.isa import isa_of

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.skipif(compiler() is None or isinstance(isa_of("cpu"), str), reason="the cpu backend cannot run here")
def test_rows_fall_by_the_share(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    words = ["--shapes", "toy", "--tokens", "5,33", "--share", "0.5", "--seconds", "0.01", "--threads", "1"]
    made = subprocess.run(
        [sys.executable, "-W", "ignore", str(FOLDER / "zero_experts.py"), *words, "--json", str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    cells = json.loads(file.read_text())["cells"]
    assert [c["tokens"] for c in cells] == [5, 33]
    for c in cells:
        assert c["rows"]["without"] == c["tokens"] * 4
        assert 0.2 < c["share"] < 0.8
        assert c["rows"]["with"] == pytest.approx(c["rows"]["without"] * (1 - c["share"]))
        assert c["flops"]["with"] == pytest.approx(6 * c["rows"]["with"] * 64 * 32)
        assert c["speedup"] == pytest.approx(c["seconds"]["without"] / c["seconds"]["with"])
        assert c["error"] < 3e-2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--shapes longcat", "choose of longcat-32"),
        ("--share 1", "between 0 and 1"),
        ("--share half", "give numbers"),
    ],
)
def test_words_that_mean_nothing(
    words: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["zero_experts", *words.split()])
    with pytest.raises(SystemExit):
        importlib.import_module("zero_experts").arguments()
    assert says in capsys.readouterr().err
