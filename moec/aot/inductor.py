"""AOTInductor, told what an artifact needs: our code in the library, and instructions of the lowest declared level."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._inductor import codecache, cpu_vec_isa
from torch._inductor import config as inductor_config
from torch.export import ExportedProgram

from moec.aot.lowering import Embedding
from moec.backends.cpu.aot import declared, lowest
from moec.ir.errors import MoecError


class InductorError(MoecError):
    """AOTInductor cannot make a library of the program."""

    code = "aot-inductor"


class _Avx512(cpu_vec_isa.VecAVX512):
    """AVX-512 without the extensions that the compiling machine happens to have."""

    def build_arch_flags(self) -> str:
        return self._arch_flags


@contextlib.contextmanager
def _instructions(target: str) -> Iterator[None]:
    """Inductor's kernels use what the lowest declared level has, whatever this machine has."""
    known = cpu_vec_isa.supported_vec_isa_list
    before = list(known)
    known[:] = [cpu_vec_isa.VecAVX2()] if lowest(target).vector_bits == 256 else [_Avx512()]
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    try:
        yield
    finally:
        known[:] = before
        cpu_vec_isa.valid_vec_isa_list.cache_clear()


@contextlib.contextmanager
def _weights_later() -> Iterator[None]:
    """The library maps a blob of weights that is written later; Inductor serialises none and needs none in memory."""
    name = "determine_aoti_mmap_flags"
    before = getattr(codecache, name, None)
    if before is None:
        raise InductorError(
            f"torch {torch.__version__} is not known to moec's ahead-of-time door", hint="use torch 2.13"
        )
    setattr(codecache, name, lambda size: (True, False))
    try:
        yield
    finally:
        setattr(codecache, name, before)


@contextlib.contextmanager
def _library_path(folder: Path) -> Iterator[None]:
    before = os.environ.get("LIBRARY_PATH")
    os.environ["LIBRARY_PATH"] = f"{folder}{os.pathsep + before if before else ''}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LIBRARY_PATH"]
        else:
            os.environ["LIBRARY_PATH"] = before


def settings(embedding: Embedding, library: Path | None) -> dict[str, Any]:
    """Inductor's options for one artifact."""
    if not hasattr(inductor_config.cpp, "march"):
        raise InductorError(
            f"torch {torch.__version__} builds for the processor at hand alone", hint="install torch 2.13 or newer"
        )
    low = lowest(embedding.target)
    return {
        "aot_inductor.custom_ops_to_c_shims": embedding.shims,
        "aot_inductor.custom_op_libs": [library.stem.removeprefix("lib")] if library is not None else [],
        "aot_inductor.package_constants_in_so": False,
        "always_keep_tensor_constants": True,  # values come later: none may be written into the code
        "cpp.march": low.march,
        "cpp.simdlen": low.vector_bits,
        "cpp.dynamic_threads": True,
        "freezing": False,
    }


def compile_package(program: ExportedProgram, embedding: Embedding, library: Path | None, path: Path) -> None:
    """Compile ``program`` to AOTInductor's package ``path`` (a ``.pt2``).

    Raises:
        InductorError: Inductor or the compiler fails; the message is its own first line.
    """
    declared(embedding.target)
    folder = library.parent if library is not None else path.parent
    with _instructions(embedding.target), _library_path(folder), _weights_later():
        try:
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=settings(embedding, library)
            )
        except MoecError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InductorError(f"AOTInductor cannot compile the program: {type(error).__name__}: {first}") from error
