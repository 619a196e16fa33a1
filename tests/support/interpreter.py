"""Triton's interpreter for some tests of a process, whatever the others do.

Triton decides when a function is defined, its own library's included, whether it is compiled or interpreted. So there
is a second copy of its Python modules here, imported under ``TRITON_INTERPRET=1``, which takes the place of the first
while it is wanted. Both share the compiled part.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from unittest import mock


def _taken() -> dict[str, ModuleType]:
    """The Python modules of Triton that are imported now."""
    names = [n for n in sys.modules if n.split(".")[0] == "triton" and not n.startswith("triton._C")]
    return {n: sys.modules[n] for n in names}


def _put(modules: dict[str, ModuleType]) -> None:
    for name in _taken():
        del sys.modules[name]
    sys.modules.update(modules)


@lru_cache(maxsize=1)
def _second_copy() -> dict[str, ModuleType]:
    before = _taken()
    _put({})
    try:
        importlib.import_module("triton")
        importlib.import_module("triton.runtime.interpreter")
        copy = _taken()
    finally:
        _put(before)
    atexit.register(_empty, copy)
    return copy


def _empty(modules: dict[str, ModuleType]) -> None:
    """What Python does at its end with modules it knows of. Without, the compiled part would tell of leaks."""
    for module in modules.values():
        module.__dict__.clear()


@contextmanager
def interpreting() -> Iterator[None]:
    """``TRITON_INTERPRET=1`` while it lasts."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        copy, before = _second_copy(), _taken()
        _put(copy)
        try:
            yield
        finally:
            _put(before)
