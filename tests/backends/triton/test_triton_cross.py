"""What a compiled kernel asks of its launch is what moec's launches give."""

from __future__ import annotations

import pytest

from moec.backends.triton.compiled import cross
from moec.backends.triton.compiled.cross import CrossError, compile_kernel, refusal
from moec.backends.triton.launches.device import device_of
from moec.backends.triton.module import load_module

pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal() or "")

COPY = """
import triton
import triton.language as tl


@triton.jit
def copy(x, y):
    i = tl.arange(0, 128)
    tl.store(y + i, tl.load(x + i))
"""


@pytest.mark.parametrize("target", ["cuda:sm90", "hip:gfx942"])
def test_a_launch_that_asks_for_more_is_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, function = device_of(target), load_module(COPY).copy
    signature = {"x": "*fp32", "y": "*fp32"}
    assert compile_kernel(function, signature, {}, device, warps=2, stages=1).threads == 2 * device.warp
    monkeypatch.setattr(cross, "_USUAL", {**cross._USUAL, "num_ctas": 2, "num_warps": 4})
    with pytest.raises(CrossError, match=r"launched with num_ctas, num_warps"):
        compile_kernel(function, signature, {}, device, warps=2, stages=1)
