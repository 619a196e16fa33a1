"""Launches of compiled kernels against those of Triton's own launchers, argument by argument, for CUDA and for HIP.

Both are given the same kernel and the same tensors, on a library that stands in for either driver and writes down what
it is asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moec.backends.cpu.build import compiler
from moec.backends.triton.compiled.cross import refusal
from tests.backends.triton.both_launchers import KERNELS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(refusal()) or compiler() is None, reason=refusal() or "there is no C++ compiler"),
]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both drivers' names for one library."""
    folder = tmp_path_factory.mktemp("drivers")
    command = [compiler() or "g++", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", HERE / "recording_driver.cpp"]
    subprocess.run(command, check=True)
    (folder / "libamdhip64.so").symlink_to("libcuda.so.1")
    return folder


def launches(kind: str, drivers: Path) -> list[dict[str, Any]]:
    """What the two launchers ask of the driver for each kernel, in a process of its own."""
    found = {
        "LD_LIBRARY_PATH": str(drivers), "TRITON_LIBCUDA_PATH": str(drivers),
        "TRITON_LIBHIP_PATH": str(drivers / "libamdhip64.so"), "TRITON_CACHE_DIR": str(drivers / "cache"),
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "tests.backends.triton.both_launchers", kind],
        env={**os.environ, **found}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not ran.returncode, ran.stderr
    told: list[dict[str, Any]] = json.loads(ran.stdout)
    return told


@pytest.mark.parametrize("kind", ["cuda", "hip"])
def test_launches_are_those_of_tritons_own_launcher(kind: str, drivers: Path) -> None:
    told = launches(kind, drivers)
    assert [row["kernel"] for row in told] == list(KERNELS)
    for row in told:
        ours, theirs = row["ours"], row["theirs"]
        assert ours["grid"] == theirs["grid"]
        assert ours["threads"] == theirs["threads"] == [128 if kind == "cuda" else 256, 1, 1]
        assert ours["shared"] == theirs["shared"]
        assert ours["stream"] == theirs["stream"]
        assert ours["arguments"] == theirs["arguments"]
        assert ours["profiling"] == theirs["profiling"] == 0
        assert bool(ours["scratch"]) == bool(theirs["scratch"])
        assert row["our_scratch"] == row["their_scratch"]
        assert theirs["attributes"] == 0  # nothing that ours would have to ask for as well
    assert any(row["our_scratch"] for row in told) == (kind == "cuda")  # descriptors need memory
