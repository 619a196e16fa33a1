"""``python -m tests.backends.triton.both_launchers cuda``: launches kernels twice and prints what each driver saw.

Runs in a process whose drivers are ``recording_driver.cpp``.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import torch
from torch import Tensor

from moec.backends.base import program_op
from moec.backends.triton.compiled.driver import Driver
from moec.backends.triton.compiled.plan import Call, calls
from moec.backends.triton.compiled.prebuilt import Prebuilt, PrebuiltLauncher
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.launches.device import device_of
from moec.backends.triton.launches.tiles import Launch, Tile
from moec.backends.triton.module import load_module
from moec.backends.triton.spec import read_spec
from tests.backends.cases import ExpertsCase

KERNELS = ("sort_few", "up", "down", "combine")
TOKENS = 5


class Seen(ctypes.Structure):
    """What the library remembers of a launch."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint), ("stream", ctypes.c_uint64), ("bytes", ctypes.c_ubyte * 512),
    )  # fmt: skip


def _bytes_of(type: str) -> int:
    return 8 if type.startswith("*") else int(type[1:]) // 8


class Library:
    """The stand-in for a driver."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)

    def expect(self, types: list[str]) -> None:
        """The next launches have arguments of these types, then two pointers."""
        self.sizes = [*map(_bytes_of, types), 8, 8]
        (ctypes.c_int * 64).in_dll(self._library, "sizes")[: len(self.sizes)] = self.sizes
        ctypes.c_int.in_dll(self._library, "count").value = len(self.sizes)

    def seen(self) -> dict[str, Any]:
        """The last launch."""
        told = Seen.in_dll(self._library, "seen")
        words = [int.from_bytes(bytes(told.bytes[8 * i : 8 * i + n]), "little") for i, n in enumerate(self.sizes)]
        return {
            "grid": list(told.grid), "threads": list(told.block), "shared": told.shared, "stream": told.stream,
            "attributes": told.attributes, "arguments": words[:-2], "scratch": words[-2], "profiling": words[-1],
        }  # fmt: skip


class Theirs:
    """Triton's own launcher."""

    def __init__(self, kind: str) -> None:
        import triton

        if kind == "cuda":
            from triton.backends.nvidia.driver import CudaDriver as Active
        else:
            from triton.backends.amd.driver import HIPDriver as Active  # type: ignore[assignment]
        self.driver = Active()
        triton.runtime.driver.set_active(self.driver)
        triton.set_allocator(self._allocate)
        self.scratch = 0

    def _allocate(self, size: int, align: int, stream: int | None) -> Tensor:
        self.scratch = size
        return torch.empty(size, dtype=torch.int8)

    def __call__(self, made: Any, grid: tuple[int, ...], given: list[Any]) -> int:
        """Launch what ``triton.compile`` made; returns the bytes of scratch memory it asked for."""
        self.scratch = 0
        launcher = self.driver.launcher_cls(made.src, made.metadata)
        _, function, *_ = self.driver.utils.load_binary(made.name, made.kernel, made.metadata.shared, 0)
        x, y, z = (*grid, 1, 1)[:3]
        launcher(x, y, z, 0, function, made.packed_metadata, None, None, None, *given)
        return self.scratch


def _tensors(call: Call, types: dict[str, str]) -> dict[str, Any]:
    """Arguments of a kernel: memory for pointers, and numbers that are told apart."""
    memory = {name: torch.zeros(64, dtype=torch.int64) for name, type in types.items() if type.startswith("*")}
    numbers = {name: 16 * (i + 3) for i, name in enumerate(types)}
    return {name: memory.get(name, numbers[name]) for name in types}


def _both(call: Call, file: Any, module: Any, device: Any, theirs: Theirs, library: Library, path: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    declared = file.kernels[call.kernel]
    types = {a.name: a.type for a in declared.arguments}
    signature = types | dict.fromkeys(declared.constants, "constexpr")
    constants = dict(call.constants)
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in call.aligned}
    made = triton.compile(
        ASTSource(getattr(module, call.kernel), signature, constants, attrs),
        target=GPUTarget("hip" if device.hip else "cuda", device.arch, device.warp),
        options={"num_warps": call.warps, "num_stages": call.stages},
    )
    meta, given = made.metadata, _tensors(call, types)
    grid = declared.grid(TOKENS, constants)
    library.expect(list(types.values()))
    values = [given[n].data_ptr() if isinstance(given[n], Tensor) else given[n] for n in types]
    asked = theirs(made, grid, [*values, *constants.values()])
    told = {"kernel": call.kernel, "theirs": library.seen(), "their_scratch": asked}
    threads = meta.num_warps * device.warp
    kernel = Prebuilt(call, made.name, threads, meta.shared, meta.global_scratch_size, lambda: made.kernel)
    launcher = PrebuiltLauncher(file, [kernel], Driver(path, "hip" if device.hip else "cu", lambda: 0))
    launcher(call.kernel, TOKENS, given, constants, num_warps=call.warps, num_stages=call.stages)
    blocks = 1
    for size in grid:
        blocks *= size
    return told | {"ours": library.seen(), "our_scratch": meta.global_scratch_size * blocks}


def main(kind: str) -> None:
    """Print a JSON list, one entry a kernel."""
    device = device_of("cuda:sm90" if kind == "cuda" else "hip:gfx942")
    path = "libcuda.so.1" if kind == "cuda" else "libamdhip64.so"
    spec = read_spec(program_op(ExpertsCase(bias=True, dtype="bf16", hidden=64, inner=32).graph()))
    file = write_experts(spec)
    tile = Tile(64, 32, 32, num_warps=4, num_stages=2, tma=not device.hip)
    found = {call.kernel: call for call in calls(spec, Launch("gemm", tile, tile), TOKENS, file)}
    theirs, library = Theirs(kind), Library(path)
    module = load_module(file.text)
    print(json.dumps([_both(found[k], file, module, device, theirs, library, path) for k in KERNELS]))


if __name__ == "__main__":
    main(sys.argv[1])
