"""Loading a compiled kernel: ctypes and one call with a table of 64-bit numbers.

The kernel's OpenMP calls go to the library that torch has loaded. A second OpenMP runtime would bring a second pool of
threads, and two pools that spin on the same cores slow each other many times over.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

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
    """A loaded kernel. Calling it releases the interpreter's lock; calls from several threads are independent.

    Attributes:
        room: Bytes of scratch memory that each thread of a call needs.
    """

    def __init__(self, path: Path) -> None:
        openmp_library()
        try:
            library = ctypes.CDLL(str(path))
            self._run, room = library.moec_experts, library.moec_room
        except (OSError, AttributeError) as error:
            raise LoadError(
                f"the compiled kernel {path} cannot be loaded: {error}", hint="delete the file; it is built again"
            ) from error
        room.restype = ctypes.c_int64
        self.room = int(room())
        self._run.restype = None
        self._run.argtypes = [ctypes.c_void_p]

    def __call__(self, fields: Sequence[int]) -> None:
        """Run on the fields of ``Call`` (include/experts.h) in their order."""
        table = (ctypes.c_int64 * len(fields))(*fields)
        self._run(ctypes.addressof(table))
