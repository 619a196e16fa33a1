"""Compiling a source to a shared library, once for each content.

The library's name is a hash over the source, the headers, the compiler's version and its flags. It is compiled under
another name and renamed when it is whole, so that a killed build leaves nothing that looks finished. Of processes that
want the same one, as ranks do, one builds and the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from moec.backends.cpu.isa import Isa
from moec.cache import cache_dir
from moec.ir.errors import MoecError

INCLUDE = Path(__file__).resolve().parent / "include"
FLAGS = ("-std=c++17", "-O2", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off")
SLOW_SECONDS = 2.0
"""A build that takes longer is told of while it runs."""
BUILD_SECONDS = 300.0
LOG = logging.getLogger("moec.cpu")
EXTRA_FLAGS = "MOEC_CXXFLAGS"
"""Environment variable: more flags for the compiler, such as ``-g`` for a profiler or ``-fsanitize=address``."""
_LOCK = threading.Lock()


class BuildError(MoecError):
    """There is no C++ compiler, or it refused a kernel."""

    code = "cpu-build"


@lru_cache(maxsize=8)
def _version(command: str) -> str:
    made = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, timeout=60, check=False)
    return made.stdout.splitlines()[0] if made.returncode == 0 and made.stdout else ""


def compiler() -> str | None:
    """The compiler's command line: ``$CXX``, else ``g++``, else ``c++``; None where there is none."""
    for command in (os.environ.get("CXX", ""), "g++", "c++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return command
    return None


@lru_cache(maxsize=1)
def warn_of_no_compiler() -> None:
    """Say once that kernels cannot be compiled here."""
    LOG.warning(
        "moec: no C++ compiler was found, so the cpu backend's kernels cannot be built and slower ones run; "
        "install g++ (or set CXX)"
    )


def compiler_text() -> str:
    """The compiler and its version, for messages; empty where there is none."""
    command = compiler()
    return "" if command is None else _version(command) or command


@lru_cache(maxsize=1)
def _headers() -> bytes:
    return b"".join(path.name.encode() + path.read_bytes() for path in sorted(INCLUDE.glob("*.h")))


def _flags(isa: Isa, extra: tuple[str, ...]) -> tuple[str, ...]:
    return (*FLAGS, *isa.flags, *extra, *shlex.split(os.environ.get(EXTRA_FLAGS, "")))


def library_path(source: str, isa: Isa, extra: tuple[str, ...] = ()) -> Path:
    """Where the library of ``source`` lies once it is built."""
    parts = (source.encode(), _headers(), compiler_text().encode(), " ".join(_flags(isa, extra)).encode())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return cache_dir() / "cpu" / f"{digest.hexdigest()[:40]}.so"


def build(source: str, isa: Isa, extra: tuple[str, ...] = ()) -> Path:
    """The compiled library; compiles it unless it is in the cache.

    Raises:
        BuildError: No compiler, or it fails; the source is kept beside the cache for a look.
    """
    path = library_path(source, isa, extra)
    if path.exists():
        return path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _LOCK, _turn(path.with_suffix(".lock")):
        if not path.exists():
            _compile(source, isa, extra, path)
    return path


@contextlib.contextmanager
def _turn(lock: Path) -> Iterator[None]:
    """Wait for other processes that hold ``lock``; one that is killed lets go of it."""
    with lock.open("w") as held:
        with contextlib.suppress(OSError):  # a file system without locks: then both build, which is as right
            fcntl.flock(held, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _compile(source: str, isa: Isa, extra: tuple[str, ...], path: Path) -> None:
    command = compiler()
    if command is None:
        raise BuildError(
            "the cpu backend needs a C++ compiler and found neither g++ nor c++",
            hint="install g++ (or set CXX), or use the backend 'aten'",
        )
    started = time.monotonic()
    timer = threading.Timer(SLOW_SECONDS, lambda: LOG.warning("still compiling a kernel for %s ...", isa.name))
    timer.start()
    _tell(f"moec: compiling a kernel for cpu:{isa.name} ...")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
            text, made = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            text.write_text(source)
            objects = ["-c", "-o", str(Path(folder) / "kernel.o"), str(text)]
            words = [*shlex.split(command), *_flags(isa, extra)]
            # OpenMP's library is not linked: the kernel uses the one that torch brought (see load.py).
            _run([*words, f"-I{INCLUDE}", *objects], source, path)
            words = [w for w in words if w != "-fopenmp"]
            _run([*words, "-shared", "-o", str(made), str(Path(folder) / "kernel.o")], source, path)
            os.replace(made, path)
    finally:
        timer.cancel()
        _tell("")
    LOG.info("compiled a kernel for %s in %.1f s", isa.name, time.monotonic() - started)


def _tell(text: str) -> None:
    """A line on a terminal, over the one before; nothing where nobody looks."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _run(command: list[str], source: str, path: Path) -> None:
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler did not finish: {error}", hint="use the backend 'aten'") from error
    if made.returncode != 0:
        kept = path.with_suffix(".failed.cpp")
        kept.write_text(source)
        first = next((line for line in made.stderr.splitlines() if "error" in line), made.stderr[:200])
        raise BuildError(
            f"the C++ compiler refused a generated kernel: {first.strip()}",
            hint=f"the source is kept as {kept}; use the backend 'aten' meanwhile",
        )
