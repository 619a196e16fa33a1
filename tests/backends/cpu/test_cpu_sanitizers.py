"""Kernels built with the address and undefined-behaviour sanitizers, over odd sizes, layouts and empty experts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moec.backends.cpu.build import EXTRA_FLAGS, compiler
from moec.backends.cpu.isa import LEVELS, missing

ROOT = Path(__file__).resolve().parents[3]
HERE = [name for name, isa in LEVELS.items() if not missing(isa)]
FLAGS = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
PROGRAM = """
import sys
import torch
from moec.backends.cpu import CpuBackend
from tests.backends.cases import TOLERANCE, ExpertsCase, loop_experts, relative_error, route_graph

torch.set_num_threads(2)
backend, target = CpuBackend(), sys.argv[1]
for case in (
    ExpertsCase(hidden=301, inner=70, dtype="bf16", weight_dtype="f32", layout="interleaved", bias=True),
    ExpertsCase(hidden=33, inner=21, dtype="bf16", up_form="kn", down_form="kn", layout="separate", stacked=False),
    ExpertsCase(hidden=39, inner=75, dtype="f16", layout="rows", captures=True, post=True, sentinels=True),
    ExpertsCase(hidden=37, dtype="bf16", stacked=False, bias=True, widths=(70, 3, 300, 1, 33)),
):
    kernel = backend.load(backend.lower(case.graph(), target))
    for tokens, skew in ((0, "uniform"), (1, "uniform"), (33, "one_expert"), (40, "uniform")):
        inputs = case.inputs(tokens, skew)
        # Exactly as large as they say, so that a read past the end is seen.
        got = kernel.forward(inputs)[0]
        assert relative_error(got, loop_experts(case, inputs)) <= TOLERANCE[case.dtype]
        if tokens and case.bias:
            needs = [t.is_floating_point() for t in inputs]
            kernel.backward([torch.ones_like(got)], inputs, needs)
router = route_graph(60, k=6, renormalize=True)
kernel = backend.load(backend.lower(router, target))
kernel.forward([torch.randn(7, 60)])
print("clean")
"""


def _sanitizer() -> str | None:
    command = compiler()
    if command is None or shutil.which(command.split()[0]) is None:
        return None
    made = subprocess.run(
        [*command.split(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    )
    path = made.stdout.strip()
    return path if Path(path).is_absolute() else None


@pytest.mark.slow
@pytest.mark.parametrize("level", HERE[-1:])
def test_kernels_touch_nothing_that_is_not_theirs(level: str, tmp_path: Path) -> None:
    library = _sanitizer()
    if library is None:
        pytest.skip("the compiler has no address sanitizer")
    environ = {
        **os.environ,
        EXTRA_FLAGS: FLAGS,
        "MOEC_CACHE_DIR": str(tmp_path / "cache"),
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONPATH": str(ROOT),
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "2",
    }
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"cpu:{level}"],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0 and made.stdout.endswith("clean\n"), made.stderr[-4000:]
