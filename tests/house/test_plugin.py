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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

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
EXPLAIN = """
import json, moec.api
from examples.factory import olmoe
model, args, kwargs = olmoe()
report = moec.api.explain(model, args, kwargs, backends=["loops", "aten"])
print(json.dumps([b.backend for b in report.layers]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python with the package installed in a folder of its own."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(HERE / "plugin_package", folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    made = subprocess.run(
        [*pip, "--target", str(folder / "site"), str(folder / "source")], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    path = os.pathsep.join([str(folder / "site"), str(ROOT)])

    def call(*args: str, text: str = "") -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MOEC_CACHE_DIR": str(folder / "cache")}
        return subprocess.run([sys.executable, *args], input=text, capture_output=True, text=True, env=env, cwd=ROOT)

    return call


def test_it_is_listed(run: Run) -> None:
    listed = run("-m", "moec", "passes")
    assert "fuse-square-relu" in listed.stdout, listed.stderr
    assert "loops" in run("-m", "moec", "backends").stdout


def test_the_pass_runs_and_its_op_is_printed_and_parsed(run: Run) -> None:
    made = run("-m", "moec", "opt", "-", "-p", "fuse-square-relu", text=RELU)
    assert "%y = square.relu %x : f32[T, 4]" in made.stdout, made.stderr
    assert "aten.relu" not in made.stdout
    again = run("-m", "moec", "opt", "-", text=made.stdout)
    assert again.stdout == made.stdout, again.stderr


def test_the_pass_refuses_with_a_reason(run: Run) -> None:
    made = run("-m", "moec", "opt", "-", "-p", "fuse-square-relu", "--remarks", text=USED_TWICE)
    assert "square.relu" not in made.stdout
    assert "the relu is used elsewhere too" in made.stderr


def test_the_backend_claims_experts(run: Run) -> None:
    made = run("-c", EXPLAIN)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout.splitlines()[-1]) == ["loops", "loops"]


def test_without_it_nothing_of_it_is_known() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    made = subprocess.run(
        [sys.executable, "-m", "moec", "passes", "fuse-square-relu"], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert made.returncode == 2
    assert "unknown pass 'fuse-square-relu'" in made.stderr
