"""Loading a compiled kernel: ctypes and one call with a table of 64-bit numbers.

The kernel's OpenMP calls go to the library that torch has loaded. A second OpenMP runtime would bring a second pool of
threads, and two pools that spin on the same cores slow each other many times over.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moec.ir.errors import MoecError

_OPENMP = re.compile(r"/lib(?:gomp|iomp5|omp)[-.\w]*\.so[.\d]*$")


class LoadError(MoecError):
    """A compiled kernel that this process cannot load."""

    code = "cpu-load"


@lru_cache(maxsize=1)
def openmp_library() -> str:
    """The OpenMP runtime that torch uses, made visible to libraries loaded from now on."""
    torch.get_num_threads()  # whoever links OpenMP is loaded by now
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        lines = []
    found = sorted(
        {line.split(maxsplit=5)[-1] for line in lines if _OPENMP.search(line)}, key=lambda p: "torch" not in p
    )
    name = found[0] if found else "libgomp.so.1"
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise LoadError(
            f"no OpenMP runtime can be loaded: {error}", hint="install libgomp, or use the backend 'aten'"
        ) from error
    return name


class Library:
    """A loaded kernel. Its functions release the interpreter's lock; calls from several threads are independent."""

    def __init__(self, path: Path) -> None:
        openmp_library()
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise LoadError(
                f"the compiled kernel {path} cannot be loaded: {error}", hint="delete the file; it is built again"
            ) from error

    def entry(self, name: str) -> Callable[[Sequence[int]], None]:
        """A function that takes a table of 64-bit fields; called with the fields in their order."""
        function = self._function(name)
        function.restype = None
        function.argtypes = [ctypes.c_void_p]

        def call(fields: Sequence[int]) -> None:
            table = (ctypes.c_int64 * len(fields))(*fields)  # alive until the call is over
            function(ctypes.addressof(table))

        return call

    def number(self, name: str, *arguments: int) -> int:
        """The result of a function of 64-bit numbers."""
        function = self._function(name)
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_int64] * len(arguments)
        return int(function(*arguments))

    def _function(self, name: str) -> Any:
        try:
            return getattr(self._library, name)
        except AttributeError as error:
            raise LoadError(
                f"the compiled kernel {self.path} has no {name}", hint="delete the file; it is built again"
            ) from error
