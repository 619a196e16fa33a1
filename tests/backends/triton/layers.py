"""Layers for the tests of the triton backend: hostile memory, and kernels from a text that a test may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from moec.backends.base import program_op
from moec.backends.triton import kernel as kernel_module
from moec.backends.triton.kernel import TritonExperts
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.launcher import Launcher
from moec.backends.triton.launches.tiles import Launch, Tile
from moec.backends.triton.spec import Spec, read_spec
from tests.backends.cases import ExpertsCase

TILE = Tile(block_m=16, block_n=16, block_k=16, group_m=2)
GEMM = Launch("gemm", TILE, TILE)
_WIDE = Tile(block_m=32, block_n=32, block_k=32, group_m=3)
LAUNCHES = {
    "gemm": GEMM,
    "wide": Launch("gemm", _WIDE, _WIDE),
    "persistent": replace(GEMM, programs=3),
    "descriptors": Launch("gemm", replace(TILE, tma=True), replace(TILE, tma=True)),
    "two blocks": Launch("gemm", replace(TILE, units=2, late=2), replace(TILE, units=2, late=9, block_n=32)),
    "three blocks": Launch(
        "gemm", replace(TILE, units=3, tma=True, ahead=5, late=1), replace(TILE, units=3, tma=True, ahead=2)
    ),
    "four blocks": replace(Launch("gemm", replace(TILE, units=4), replace(TILE, units=4)), programs=2),
    "four blocks, split": Launch("gemm", replace(TILE, units=4), replace(TILE, units=4, split_k=2, block_n=32)),
    "split": Launch("gemm", TILE, replace(TILE, split_k=2)),
    "atomic": replace(GEMM, atomic=True),
    "gemv": Launch("gemv", replace(TILE, block_m=1), replace(TILE, block_m=1, block_n=32)),
}


def around(t: Tensor, pad: int = 3) -> Tensor:
    """The same values in the middle of NaN: whatever is read beside them shows."""
    if not t.is_floating_point():
        return t
    room = torch.full([n + 2 * pad for n in t.shape], float("nan"), dtype=t.dtype)
    view = room[tuple(slice(pad, n + pad) for n in t.shape)]
    return view.copy_(t)


@contextmanager
def dirty_memory() -> Iterator[None]:
    """New tensors are full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def replaced(old: str, new: str) -> Callable[[str], str]:
    """What changes a text so; that nothing is changed is no verdict of the test."""

    def change(text: str) -> str:
        if old not in text:
            raise LookupError(old)
        return text.replace(old, new)

    return change


def run(
    case: ExpertsCase, launch: Launch, inputs: list[Tensor], change: Callable[[str], str] = lambda text: text
) -> Tensor:
    """The layer by generated kernels, launched so; ``change`` changes their text."""
    op = program_op(case.graph())
    kernel = TritonExperts(op, read_spec(op), "cuda:sm90")

    def launcher(spec: Spec, interpreted: bool) -> Launcher:
        file = write_experts(spec, interpreted)
        return Launcher(replace(file, text=change(file.text)))

    before = kernel_module.choose, kernel_module.launcher
    try:
        kernel_module.choose = lambda spec, tokens, target: launch
        kernel_module.launcher = launcher  # type: ignore[assignment]
        with dirty_memory(), torch.no_grad():
            return kernel.forward(inputs)[0]
    finally:
        kernel_module.choose, kernel_module.launcher = before
