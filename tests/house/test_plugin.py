"""A separately installed package adds an op, a pass and a backend through the entry points, by one file each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.cli.app import main

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
Run = Callable[..., list[tuple[int, str, str]]]

RELU = """graph @f(%x: f32[T, 4]) -> f32[T, 4] {
  %r = torch.call @aten.relu.default(%x) : f32[T, 4]
  %y = torch.call @aten.mul.Tensor(%r, %r) : f32[T, 4]
  return %y
}
"""
USED_TWICE = """graph @f(%x: f32[T, 4]) -> (f32[T, 4], f32[T, 4]) {
  %r = torch.call @aten.relu.default(%x) : f32[T, 4]
  %y = torch.call @aten.mul.Tensor(%r, %r) : f32[T, 4]
  return %y, %r
}
"""
# Importing torch takes seconds: one process runs several command lines, as the script would.
DRIVER = """
import contextlib, io, json, sys
from moec.cli.app import main
answers = []
for arguments, text in json.load(sys.stdin):
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            answers.append((stop.code or 0, out.getvalue(), err.getvalue()))
json.dump(answers, sys.stdout)
"""
EXPLAIN = """
import json, moec
from examples.factory import olmoe
model, args, kwargs = olmoe()
report = moec.explain(model, args, kwargs, backends=["loops", "aten"])
print(json.dumps([b.backend for b in report.layers]))
"""


def python(code: str, path: list[Path], text: str = "") -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    made = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, env=env, cwd=ROOT)
    assert made.returncode == 0, made.stderr
    return made.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the package is installed into."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(HERE / "plugin_package", folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    made = subprocess.run(
        [*pip, "--target", str(folder / "site"), str(folder / "source")], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def run(site: Path) -> Run:
    """Runs ``moec`` command lines, each (arguments, stdin), where the package is installed."""

    def call(*commands: tuple[list[str], str]) -> list[tuple[int, str, str]]:
        return [tuple(answer) for answer in json.loads(python(DRIVER, [site, ROOT], json.dumps(commands)))]

    return call


def test_op_and_pass(run: Run) -> None:
    opt = ["opt", "-", "-p", "fuse-square-relu", "--remarks"]
    passes, backends, fused, refused = run((["passes"], ""), (["backends"], ""), (opt, RELU), (opt, USED_TWICE))
    assert "fuse-square-relu" in passes[1]
    assert "loops" in backends[1]
    assert "%y = square.relu %x : f32[T, 4]" in fused[1], fused[2]
    assert "aten.relu" not in fused[1]
    assert "square.relu" not in refused[1]
    assert "the relu is used elsewhere too" in refused[2]
    ((code, text, problems),) = run((["opt", "-"], fused[1]))  # its op is read without its pass being asked for
    assert (code, text) == (0, fused[1]), problems


def test_backend(site: Path) -> None:
    assert json.loads(python(EXPLAIN, [site, ROOT]).splitlines()[-1]) == ["loops", "loops"]


def test_without_the_package_nothing_of_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["passes", "fuse-square-relu"])
    assert "unknown pass 'fuse-square-relu'" in capsys.readouterr().err
