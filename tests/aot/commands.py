"""``moec run``, ``inspect`` and ``bench`` on a real artifact, for a test that has one: making one takes long."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.cli.app import main
from moec.ir.parser import parse_graph
from tests.aot.artifacts import TOLERANCE
from tests.support import models


def check_commands(artifact: Path, model: torch.nn.Module, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the commands on an artifact of a small Mixtral of two layers; ``model`` is that in eager form."""
    path, arrays, made = str(artifact), str(folder / "in.npz"), str(folder / "out.npz")

    def moec(*args: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as stop:
            main(args)
        captured = capsys.readouterr()
        assert (stop.value.code or 0) == code, captured.err
        return captured.err if code else captured.out

    tokens = models.inputs("mixtral", 2, 5)["input_ids"]
    with torch.no_grad():
        want = model(tokens)
    np.savez(arrays, input_ids=tokens.numpy())
    assert "f32[2, 5, 128]" in moec("run", path, "--input", arrays, "-o", made)
    torch.testing.assert_close(torch.from_numpy(np.load(made)["output0"]), want, rtol=TOLERANCE, atol=TOLERANCE)
    printed = moec("run", path, "--tokens", ",".join(map(str, tokens[0].tolist())))
    assert printed.splitlines()[-1] == f"next token: {int(want[0, -1].argmax())}"
    assert "has no array 'input_ids'" in moec("run", path, "--input", made, code=2)
    assert "cannot be read as .npz" in moec("run", path, "--input", path + ".gone", code=2)
    assert "either --tokens or --input" in moec("run", path, code=2)
    assert "write numbers" in moec("run", path, "--tokens", "1,x", code=2)
    assert "not compiled for generating" in moec("run", path, "--tokens", "1", "--generate", "2", code=2)

    shown = moec("inspect", path, "--verify")
    assert "entry model: input_ids: i64[batch, seq] -> f32[batch, seq, 128]; batch 1 to 8, seq 1 to 64" in shown
    assert "passes: functionalize,canonicalize," in shown and "every hash is right" in shown
    assert json.loads(moec("inspect", path, "--json"))["format"] == "moec-artifact"
    graph = parse_graph(moec("inspect", path, "--ir"))
    assert [op.name for op in graph.ops if op.dialect == "moe"] == ["moe.route", "moe.experts"] * 2

    found = json.loads(moec("bench", path, "--sizes", "1,9", "--repeats", "2", "--json"))
    assert [row["sizes"] for row in found["rows"]] == [{"batch": 1, "seq": 1}, {"batch": 1, "seq": 9}]
    assert found["load_s"] > 0 and all(row["seconds"] > 0 for row in found["rows"])
    assert "tokens/s" in moec("bench", path, "--repeats", "1")
    assert "seq is 65" in moec("bench", path, "--sizes", "65", code=2)
