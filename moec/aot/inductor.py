"""AOTInductor, told what an artifact needs: our code in the library, and instructions of the lowest declared level."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import tempfile
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
        "aot_inductor.precompile_headers": False,  # making them takes longer than a compile without them
        "aot_inductor.compile_wrapper_opt_level": "O0",  # it calls kernels and does nothing else
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
    folder = library.parent if library is not None else path.parent
    with _library_path(folder), _compiling(embedding.target):
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=settings(embedding, library)
        )


def generate(module: torch.fx.GraphModule, embedding: Embedding) -> tuple[str, list[str]]:
    """C++ that AOTInductor makes of a graph without weights, and flags to compile it with.

    Args:
        module: Its placeholders carry fake tensors.

    Raises:
        InductorError: Inductor fails.
    """
    given = tuple(n.meta["val"] for n in module.graph.find_nodes(op="placeholder"))
    only = {"aot_inductor.package": True, "aot_inductor.package_cpp_only": True}
    with tempfile.TemporaryDirectory() as folder, _compiling(embedding.target):
        options = {**settings(embedding, None), **only, "aot_inductor.output_path": folder}
        made: Any = torch._inductor.aot_compile(module, given, options=options)
        files = [f for f in made if isinstance(f, str)]
        source = next(Path(f).read_text(encoding="utf-8") for f in files if f.endswith(".cpp"))
        flags = json.loads(next(Path(f).read_text() for f in files if f.endswith("_compile_flags.json")))
    words = [f"-D{d.strip()}" for d in flags["definitions"]] + [f"-I{d}" for d in flags["include_dirs"]]
    words += [f"-{f}" for f in flags["cflags"] if f != "g1"]
    return source, words + shlex.split(" ".join(flags["passthrough_args"]))


@contextlib.contextmanager
def _compiling(target: str) -> Iterator[None]:
    """AOTInductor at work: for ``target``, without weights, and with its errors told."""
    declared(target)
    with _instructions(target), _weights_later():
        try:
            yield
        except MoecError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InductorError(f"AOTInductor cannot compile the program: {type(error).__name__}: {first}") from error
