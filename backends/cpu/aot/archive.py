"""Embedded programs compiled to one static library, which Inductor links into the artifact's code.

An object file is made once for every content and kept in the cache directory. Kernels of several instruction sets come
together in one library, so each object shows its own functions alone: what the compiler makes of templates and inline
functions would have one name in all of them, and the linker would keep the AVX-512 one for everybody.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from moec.backends.cpu.aot.embedded import Embedded
from moec.backends.cpu.aot.levels import lowest
from moec.backends.cpu.build import EXTRA_FLAGS, FLAGS, INCLUDE, BuildError, compiler, compiler_text
from moec.backends.cpu.isa import LEVELS, Isa
from moec.cache import cache_dir

HERE = Path(__file__).resolve().parent
HEADERS = HERE / "include"
TORCH_HEADERS = Path(torch.__file__).parent / "include"
BUILD_SECONDS = 600.0
Told = Callable[[str], None]


def archive(
    programs: Sequence[Embedded], target: str, told: Told = lambda _: None, others: Sequence[Path] = ()
) -> Path:
    """The static library of ``programs``; compiles what is not in the cache.

    Args:
        programs: Every name once.
        target: ``cpu`` or ``cpu:LEVEL``.
        told: Hears which object is being compiled.
        others: Object files that go into the library besides; their names depend on their content.

    Returns:
        The path of a file ``lib<name>.a``; the name depends on the content.

    Raises:
        BuildError: There is no compiler, or it fails.
    """
    note = f"-DMOEC_ISA_NEEDED={lowest(target).note}"
    torch_flags = (f"-I{TORCH_HEADERS}",)
    runtime = (HERE / "runtime.cpp").read_text(encoding="utf-8")
    told("runtime")
    objects = [*others, _object(runtime, (*torch_flags, note), None)]
    for program in programs:
        for level, text in program.kernels.items():
            told(f"{program.name.rpartition('_')[0].removeprefix('moec_')} for {level}")
            objects.append(_object(text, _isa_flags(LEVELS[level]), program.exports[level]))
        objects.append(_object(program.dispatcher, torch_flags, None))
    digest = hashlib.sha256("".join(sorted(o.name for o in objects)).encode()).hexdigest()[:DIGITS]
    path = _folder() / f"libmoec_{digest}.a"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
            made = Path(folder) / path.name
            _run([_tool("ar"), "rcs", str(made), *map(str, objects)])
            os.replace(made, path)
    return path


DIGITS = 32


def _folder() -> Path:
    folder = cache_dir() / "aot"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _isa_flags(isa: Isa) -> tuple[str, ...]:
    return (*isa.flags, f"-I{INCLUDE}")


def _object(source: str, flags: tuple[str, ...], export: str | None) -> Path:
    """The object file of one of our own sources. With ``export``, no other symbol of it is seen from outside."""
    words = [*FLAGS, *flags, f"-I{HEADERS}", *shlex.split(os.environ.get(EXTRA_FLAGS, ""))]
    digest = hashlib.sha256()
    versions = f"{compiler_text()}\n{torch.__version__}\n{export}"
    for part in (source.encode(), _headers(), versions.encode(), " ".join(words).encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    path = object_path(digest.hexdigest())
    if not path.exists():
        compile_object(source, words, export, path)
    return path


def object_path(key: str) -> Path:
    """Where the object file of this key is kept; it may not be there yet."""
    return _folder() / f"{key[:DIGITS]}.o"


def compile_object(source: str, flags: Sequence[str], export: str | None, path: Path) -> None:
    """Compile C++ to the object file ``path``. With ``export``, no other symbol of it is seen from outside.

    Raises:
        BuildError: There is no compiler, or it fails.
    """
    command = compiler()
    if command is None:
        raise BuildError("ahead-of-time compilation needs a C++ compiler and found neither g++ nor c++")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        text, raw, made = (Path(folder) / name for name in ("kernel.cpp", "raw.o", "kernel.o"))
        text.write_text(source, encoding="utf-8")
        # What is unique in a process stays so under any tool's hands: such symbols cannot be hidden.
        words = [*shlex.split(command), *flags, "-fno-gnu-unique", "-c", "-o", str(raw), str(text)]
        _run(words, keep=(text, path.with_suffix(".failed.cpp")))
        if export is None:
            made = raw
        else:
            _run([_tool("ld"), "-r", "--force-group-allocation", "-o", str(made), str(raw)])
            _run([_tool("objcopy"), f"--keep-global-symbol={export}", str(made)])
        os.replace(made, path)


def _headers() -> bytes:
    return b"".join(
        p.name.encode() + p.read_bytes() for folder in (INCLUDE, HEADERS) for p in sorted(folder.glob("*.h"))
    )


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise BuildError(f"ahead-of-time compilation needs {name!r}, which is not installed", hint="install binutils")
    return found


def _run(command: list[str], keep: tuple[Path, Path] | None = None) -> None:
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not finish: {error}") from error
    if made.returncode != 0:
        if keep is not None:
            shutil.copyfile(*keep)
        first = next((line for line in made.stderr.splitlines() if "error" in line), made.stderr[:200])
        raise BuildError(
            f"{command[0]} refused generated code: {first.strip()}",
            hint=f"the source is kept as {keep[1]}" if keep is not None else None,
        )
