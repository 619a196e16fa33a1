"""Generated files as Python modules: written to the cache under the hash of their text, imported once a process.

Triton reads the source of a function from its file, so a text has to lie on disk; it stays there for who wants to look.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import threading
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from moec.cache import cache_dir, write_atomic
from moec.ir.errors import MoecError

INSTALL = "pip install 'moec[triton]'"
_LOCK = threading.RLock()
_MODULES: dict[tuple[str, bool], ModuleType] = {}


class TritonError(MoecError):
    """Triton is missing, or cannot run what is asked of it here."""

    code = "triton"


@lru_cache(maxsize=1)
def present() -> bool:
    """Whether Triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def triton() -> Any:
    """The package.

    Raises:
        TritonError: It is not installed.
    """
    if not present():
        raise TritonError("the triton backend needs Triton, which is not installed", hint=INSTALL)
    import triton as package

    return package


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU: ``TRITON_INTERPRET=1``."""
    return present() and bool(triton().knobs.runtime.interpret)


def check_interpreter() -> None:
    """Refuse to interpret where Triton's own functions were imported to be compiled.

    Raises:
        TritonError: The variable was set too late.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if interpreted() and not isinstance(tl.sum, InterpretedFunction):
        raise TritonError(
            "TRITON_INTERPRET=1 was set after Triton had been imported",
            hint="set it in the environment that Python is started from",
        )


def file_of(text: str) -> Path:
    """Where a text lies, or would."""
    return cache_dir() / "triton" / f"kernels_{hashlib.sha256(text.encode()).hexdigest()[:32]}.py"


def load_module(text: str) -> ModuleType:
    """The module of a generated text.

    Raises:
        TritonError: Triton is missing, or the file cannot be written.
    """
    key = (text, interpreted())
    triton()
    with _LOCK:
        if key not in _MODULES:
            check_interpreter()
            path = file_of(text)
            try:
                if not path.is_file() or path.read_text() != text:
                    write_atomic(path, text)
            except OSError as error:
                raise TritonError(
                    f"the generated kernels cannot be written to {path}: {error.strerror or error}",
                    hint="set MOEC_CACHE_DIR to a directory that can be written to",
                ) from error
            spec = importlib.util.spec_from_file_location(f"moec_triton_{path.stem}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[module.__name__] = module
            spec.loader.exec_module(module)
            _MODULES[key] = module
        return _MODULES[key]
