"""moec: a compiler for Mixture-of-Experts models in PyTorch.

``torch.compile(model, backend="moec")`` is the short way in; :func:`compile`, :func:`explain` and :func:`prepare` are
the Python API, ``moec`` the command line.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec.api import compile as compile
    from moec.api import explain as explain
    from moec.artifact.load import load as load
    from moec.exported import optimize as optimize
    from moec.ir.errors import MoecError as MoecError
    from moec.parallel.parallelize import parallelize as parallelize
    from moec.readiness.pages import huge_pages as huge_pages
    from moec.readiness.prepare import prepare as prepare
    from moec.routing.record import profile_routing as profile_routing
    from moec.runtime.checks import MoecWarning as MoecWarning
    from moec.session import recording as recording

__version__ = "0.1.0"

# Looked up on first use, so that `import moec.ir` does not import torch's compiler.
_HOMES = {
    "compile": "moec.api",
    "drop_dead_experts": "moec.readiness",
    "explain": "moec.api",
    "huge_pages": "moec.readiness.pages",
    "load": "moec.artifact.load",
    "optimize": "moec.exported",
    "parallelize": "moec.parallel.parallelize",
    "prepare": "moec.readiness",
    "profile_routing": "moec.routing.record",
    "recording": "moec.session",
    "MoecError": "moec.ir.errors",
    "MoecWarning": "moec.runtime.checks",
}
__all__ = [
    "MoecError",
    "MoecWarning",
    "__version__",
    "compile",
    "drop_dead_experts",
    "explain",
    "huge_pages",
    "load",
    "optimize",
    "parallelize",
    "prepare",
    "profile_routing",
    "recording",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'moec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
