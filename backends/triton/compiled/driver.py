"""Loading compiled kernels and launching them through a GPU's own driver: CUDA's or HIP's, with nothing but ctypes.

Both drivers have the same three calls under other names. A kernel's arguments are the ones it was compiled with, then
two pointers that Triton adds: memory for descriptors of tensors, and for profiling (never used). Tests compare every
call with what Triton's own launcher makes of the same kernel.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moec.ir.errors import MoecError

_MOST_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PREFER_SHARED = 1  # CU_FUNC_CACHE_PREFER_SHARED
_SHARED_WITHOUT_ASKING = 48 * 1024
_HIP = "libamdhip64.so"
_SCALARS: dict[str, Any] = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u32": ctypes.c_uint32, "u64": ctypes.c_uint64, "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip


class DriverError(MoecError):
    """A driver that is not here, or that refuses a kernel."""

    code = "gpu-driver"


@dataclass(frozen=True)
class Function:
    """A loaded kernel.

    Attributes:
        handle: The driver's.
        threads: Of a block.
        shared: Bytes of shared memory of a block.
    """

    handle: int
    threads: int
    shared: int


class Driver:
    """The driver's library.

    Args:
        path: Of the library.
        prefix: What its functions begin with: ``cu`` or ``hip``.
        current: The number of the current device.

    Raises:
        DriverError: It is no such library.
    """

    def __init__(self, path: str, prefix: str, current: Callable[[], int] = torch.cuda.current_device) -> None:
        self.prefix, self._current = prefix, current
        try:
            self._library = ctypes.CDLL(path)
            self._load = self._library[f"{prefix}ModuleLoadData"]
            self._find = self._library[f"{prefix}ModuleGetFunction"]
            self._launch = self._library[f"{prefix}LaunchKernel" if prefix == "cu" else "hipModuleLaunchKernel"]
        except (OSError, AttributeError) as error:
            raise DriverError(f"the GPU driver {path} cannot be used: {error}", hint="moec doctor says more") from error
        self._modules: list[ctypes.c_void_p] = []  # a loaded function is valid as long as its module

    def load(self, code: bytes, name: str, threads: int, shared: int) -> Function:
        """Load a kernel into the current device.

        Args:
            code: Cubin or hsaco.
            name: Of the function in it.
            threads: Of a block.
            shared: Bytes of shared memory of a block.

        Raises:
            DriverError: The device does not take it: it is another architecture, or has less shared memory.
        """
        self._enter()
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._load(ctypes.byref(module), code), f"load {name}")
        self._modules.append(module)
        self._check(self._find(ctypes.byref(function), module, name.encode()), f"find {name}")
        if self.prefix == "cu" and shared > _SHARED_WITHOUT_ASKING:
            prefer, ask = self._library["cuFuncSetCacheConfig"], self._library["cuFuncSetAttribute"]
            self._check(prefer(function, _PREFER_SHARED), f"give {name} shared memory before cache")
            self._check(ask(function, _MOST_DYNAMIC_SHARED, shared), f"give {name} {shared} bytes of shared memory")
        return Function(function.value or 0, threads, shared)

    def launch(
        self, function: Function, grid: Sequence[int], types: Sequence[str], values: Sequence[int | float],
        stream: int = 0, scratch: int = 0,
    ) -> None:  # fmt: skip
        """Launch a kernel; nothing is waited for.

        Args:
            function: From ``load``.
            grid: Blocks in up to three dimensions.
            types: Triton's types of the run-time arguments (``"*bf16"``, ``"i32"``).
            values: Addresses of tensors, and numbers.
            stream: The driver's handle of a stream.
            scratch: Address of memory for descriptors, 0 where the kernel needs none.

        Raises:
            DriverError: The launch was refused.
        """
        packed = [pack(t, v) for t, v in zip(types, values, strict=True)]
        packed += [ctypes.c_uint64(scratch), ctypes.c_uint64(0)]
        addresses = (ctypes.c_void_p * len(packed))(*(ctypes.addressof(p) for p in packed))
        x, y, z = (*grid, 1, 1)[:3]
        if not x * y * z:
            return
        self._enter()
        told = self._launch(
            ctypes.c_void_p(function.handle), x, y, z, function.threads, 1, 1, function.shared,
            ctypes.c_void_p(stream), addresses, None,
        )  # fmt: skip
        self._check(told, "launch a kernel")

    def _enter(self) -> None:
        """Make the device's context current in this thread: CUDA's driver, unlike its runtime, does not by itself."""
        if self.prefix != "cu":
            return
        context, device = ctypes.c_void_p(), ctypes.c_int()
        self._check(self._library["cuCtxGetCurrent"](ctypes.byref(context)), "tell its context")
        if not context.value:
            self._check(self._library["cuDeviceGet"](ctypes.byref(device), self._current()), "find the device")
            self._check(self._library["cuDevicePrimaryCtxRetain"](ctypes.byref(context), device), "give a context")
            self._check(self._library["cuCtxSetCurrent"](context), "take its context")

    def _check(self, code: int, what: str) -> None:
        if code:
            raise DriverError(
                f"the GPU driver cannot {what}: its error {code}{self._name_of(code)}",
                hint="moec doctor says what is here",
            )

    def _name_of(self, code: int) -> str:
        """What the driver calls an error: `` (CUDA_ERROR_INVALID_IMAGE)``; empty where it does not say."""
        name = ctypes.c_char_p()
        try:
            if self.prefix == "cu":
                self._library["cuGetErrorName"](code, ctypes.byref(name))
            else:
                tell = self._library["hipGetErrorName"]
                tell.restype = ctypes.c_char_p
                name.value = tell(code)
        except AttributeError:
            return ""
        return f" ({name.value.decode()})" if name.value else ""


def pack(type: str, value: int | float) -> Any:
    """An argument as the driver takes it.

    Raises:
        DriverError: There is no such type.
    """
    if type.startswith("*"):
        return ctypes.c_uint64(int(value))
    if type not in _SCALARS:
        raise DriverError(f"no kernel takes an argument of type {type!r}")
    return _SCALARS[type](value)


@lru_cache(maxsize=2)
def driver(kind: str) -> Driver:
    """The driver of this machine: ``cuda`` or ``hip``.

    Raises:
        DriverError: There is none.
    """
    return Driver("libcuda.so.1", "cu") if kind == "cuda" else Driver(_hip_library(), "hip")


def _hip_library() -> str:
    """HIP's library: the one that PyTorch has loaded, wherever it lies; a second copy would know none of its memory."""
    maps = Path("/proc/self/maps")
    text = maps.read_text(encoding="utf-8", errors="replace") if maps.exists() else ""
    loaded = re.search(rf"\S+/{re.escape(_HIP)}\S*$", text, re.M)
    return loaded[0] if loaded else _HIP
