"""Compiling a Triton kernel for a GPU that is not here, and for one that is: the same call.

Triton's compiler needs no device where it is told the target. What it makes is kept in moec's cache directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moec.backends.triton.compiled.resources import Resources, read_resources
from moec.backends.triton.launches.device import Device
from moec.backends.triton.module import INSTALL, interpreted, present
from moec.cache import cache_dir
from moec.ir.errors import MoecError

_USUAL = {"num_ctas": 1, "profile_scratch_size": 0, "launch_cooperative_grid": False, "launch_pdl": False}
"""What Triton says of a launch, where it is one that ``driver.Driver.launch`` makes."""


class CrossError(MoecError):
    """A kernel that Triton cannot compile, or no Triton to do it."""

    code = "triton-compile"


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
        name: Of its function in the code object.
        code: Cubin or hsaco.
        assembly: PTX, or AMD's assembly.
        ttgir: Triton's IR for the GPU, with layouts.
        threads: Of a block.
        scratch: Bytes of memory for each block of the grid that a launch provides (descriptors of tensors).
        scratch_align: Of it, in bytes.
        resources: What it takes.
    """

    name: str
    code: bytes
    assembly: str
    ttgir: str
    threads: int
    scratch: int
    scratch_align: int
    resources: Resources


def refusal() -> str:
    """Why nothing can be compiled here; empty where it can."""
    if not present():
        return "Triton is not installed"
    return "TRITON_INTERPRET=1 has Triton interpret kernels, not compile them" if interpreted() else ""


def compile_kernel(
    function: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    device: Device,
    *,
    warps: int,
    stages: int,
    aligned: frozenset[str] = frozenset(),
) -> Binary:
    """Compile one kernel.

    Args:
        function: What ``triton.jit`` made.
        signature: Type of every argument (``"*bf16"``, ``"i32"``, ``"constexpr"``), in order.
        constants: Values of those that are constexpr.
        device: To compile for.
        warps: Of a block.
        stages: Of software pipelines.
        aligned: Arguments that are multiples of 16: pointers to 16 bytes.

    Raises:
        CrossError: Triton refuses the kernel; its first line is in the message.
    """
    if why := refusal():
        raise CrossError(f"kernels cannot be compiled: {why}", hint=INSTALL if not present() else "unset it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend = "hip" if device.hip else "cuda"
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    try:
        with _cache():
            source = ASTSource(function, dict(signature), dict(constants), attrs)
            target = GPUTarget(backend, device.arch, device.warp)
            options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
            made = triton.compile(source, target=target, options=options)
    except Exception as error:  # whatever the compiler raises is told as one error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        name = getattr(function, "__name__", "kernel")
        raise CrossError(f"Triton cannot compile {name} for {device.target.name}: {first}") from error
    asm, meta = made.asm, made.metadata
    if odd := [name for name, usual in _USUAL.items() if getattr(meta, name, usual) not in (usual, None)]:
        name = getattr(function, "__name__", "kernel")
        raise CrossError(f"{name} is to be launched with {', '.join(odd)}, which moec's launches do not give")
    code, text = (asm["hsaco"], asm["amdgcn"]) if device.hip else (asm["cubin"], asm["ptx"])
    taken = int(meta.shared)
    columns = int(getattr(meta, "tmem_size", 0) or 0)
    resources = read_resources(device, code, text, taken, columns, int(meta.num_warps))
    return Binary(
        str(meta.name), code, text, asm["ttgir"], int(meta.num_warps) * device.warp,
        int(meta.global_scratch_size), max(1, int(meta.global_scratch_align)), resources,
    )  # fmt: skip


@contextmanager
def _cache() -> Iterator[None]:
    """Triton's cache is a folder of moec's, unless the user has given it one."""
    from triton import knobs

    if os.environ.get("TRITON_CACHE_DIR"):
        yield
        return
    with knobs.cache.scope():
        knobs.cache.dir = str(cache_dir() / "triton" / "compiled")
        yield
