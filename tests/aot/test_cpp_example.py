"""The C++ example, built and run: an artifact's package through AOTInductor's loader gives eager's logits."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.aot.artifacts import PACKAGE, TOLERANCE, compiled, expected

ROOT = Path(__file__).resolve().parents[2]


def build_example(to: Path) -> Path:
    """The program that docs/aot.md says how to build."""
    here = Path(torch.__file__).parent
    flags = [f"-I{here}/include", f"-I{here}/include/torch/csrc/api/include", f"-L{here}/lib", f"-Wl,-rpath,{here}/lib"]
    libraries = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    source = ROOT / "examples" / "cpp" / "run_artifact.cpp"
    made = subprocess.run(
        ["g++", "-std=c++20", "-O0", str(source), "-o", str(to), *flags, *libraries], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return to


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_example_equals_eager(tmp_path: Path) -> None:
    from moec.cli.app import main

    path = tmp_path / "model.moec"
    model, _ = compiled("mixtral", path)  # the same code as in test_families: from the cache
    with pytest.raises(SystemExit):
        main(["inspect", str(path), "--extract", str(tmp_path / "out")])
    program = build_example(tmp_path / "run_artifact")
    for tokens, want in expected("mixtral", model):
        rows = [",".join(map(str, row)) for row in tokens.tolist()]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MOEC_OUTPUT": str(tmp_path / "logits")}
        command = [str(program), str(tmp_path / "out" / PACKAGE), *rows]
        made = subprocess.run(command, env=env, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        assert [int(line) for line in made.stdout.split()] == want[:, -1].argmax(-1).tolist()
        got = torch.from_numpy(np.fromfile(tmp_path / "logits", dtype=np.float32)).view(want.shape)
        torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)
