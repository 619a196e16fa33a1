"""A rewriter: a class that it knows, word for word, and methods that do the same in a form that can be captured.

A class is known by its module path, its name and its text: a fingerprint of every method that the rewritten ones stand
in for. A later release may change what a method computes, and nothing else would tell. So a class of the same name from
elsewhere, a patched method or a new release is left as it is, and the reason says which.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import nn

from moec.readiness.adapters import MERGE, describe, is_adapter
from moec.readiness.loops import is_marked
from moec.readiness.signature import hooks

_DIGITS = 16
PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Rewriter:
    """How to rewrite the instances of one class.

    Attributes:
        target: Import path of the class.
        how: What becomes of an instance, for the report.
        methods: The new methods by dotted path from the instance (``"forward"``, ``"router.forward"``). Each is a plain
            function of the instance; pickle finds it by its name, so it is called as what it replaces.
        sources: Fingerprints by ``Class.method``, for classes of the same module: what the new methods stand in for.
        parts: Class names by dotted path from the instance, with ``*`` as in file names: the modules inside that are no
            longer called. A name without a dot is a class of the same module.
        check: Why this instance cannot be rewritten, or None.
        note: What a user should know about this instance, or "".
        unused_bytes: Bytes of weights that the instance holds and never reads.
        free: Gives these bytes back.
        runs_experts: False for a class that stands around or beside modules that do, as adapters do.
    """

    target: str
    how: str
    methods: Mapping[str, Callable[..., Any]]
    sources: Mapping[str, str]
    parts: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Any], str | None] = lambda module: None
    note: Callable[[Any], str] = lambda module: ""
    unused_bytes: Callable[[Any], int] = lambda module: 0
    free: Callable[[Any], None] = lambda module: None
    runs_experts: bool = True

    def obstacle(self, module: nn.Module) -> str | None:
        """Why ``module``, an instance of the class, is left as it is, or None."""
        return _unknown_source(type(module), self.sources) or self._changed_inside(module) or self.check(module)

    def _changed_inside(self, module: nn.Module) -> str | None:
        for path in self.methods:
            owner, _, method = path.rpartition(".")
            part = module.get_submodule(owner)
            if method in vars(part) and not is_marked(part):
                return f"{path} was replaced on the instance"
        for name, parameter in module.named_parameters():
            if type(parameter) not in (nn.Parameter, torch.Tensor):
                return f"{name} is a {type(parameter).__name__}, which only its own forward knows to read"
        for pattern, kind in self.parts.items():
            for name, part in _submodules(module, pattern):
                found = f"{type(part).__module__}.{type(part).__qualname__}"
                if is_adapter(part):
                    return f"{name} is {describe(part)}, which only its own forward knows to apply; {MERGE}"
                if found != (kind if "." in kind else f"{type(module).__module__}.{kind}"):
                    return f"{name} is a {type(part).__name__}, where a {kind.rpartition('.')[2]} is known"
                changed = _watched(name, part)
                if changed is not None:
                    return changed
        return None


@dataclass(frozen=True)
class Declined:
    """A class that runs experts in a way that moec has no op for: left as it is, with the reason."""

    target: str
    reason: str


def _submodules(module: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """``(path, module)`` of every submodule that a dotted pattern names, ``*`` as in file names."""
    found: list[tuple[str, nn.Module]] = [("", module)]
    for step in pattern.split("."):
        found = [
            (f"{path}.{name}".lstrip("."), child)
            for path, owner in found
            for name, child in owner.named_children()
            if fnmatchcase(name, step)
        ]
    yield from found


def _watched(name: str, part: nn.Module) -> str | None:
    """Why a part must go on being called: somebody looks at its calls, or has replaced its forward."""
    for inner, module in part.named_modules(prefix=name):
        if "forward" in vars(module):
            return f"the forward of {inner} was replaced on the instance"
        for kind in hooks(module):
            return f"{inner} has a {kind}, which would no longer be called"
    return None


def _unknown_source(kind: type, sources: Mapping[str, str]) -> str | None:
    """Why the class is not the one that a rewriter was written for, or None."""
    module = sys.modules.get(kind.__module__)
    if getattr(module, kind.__name__, None) is not kind:
        return f"its class is not the one that {kind.__module__} holds now"
    for name, known in sources.items():
        owner, _, method = name.rpartition(".")
        function = vars(getattr(module, owner, object)).get(method)
        if function is None or fingerprint(function) != known:
            return f"{name} is not written as moec knows it: another release of {kind.__module__}, or a patch"
    return None


@cache
def fingerprint(function: Any) -> str:
    """A short hash of a function's text without docstring, comment lines and indentation; "" if there is none."""
    if not isinstance(function, types.FunctionType):
        return ""
    try:
        # of the code object: of a decorated function, the name would lead to the one inside
        source = textwrap.dedent(inspect.getsource(function.__code__))
        return digest(source)
    except (OSError, SyntaxError):  # no file, or a lambda's piece of a line
        return ""


def digest(source: str) -> str:
    """The hash of one function's text (see :func:`fingerprint`).

    Raises:
        SyntaxError: The text is no Python.
    """
    lines = source.splitlines()
    (node,) = ast.parse(source).body
    first = node.body[0] if isinstance(node, ast.FunctionDef) else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        assert first.end_lineno is not None
        lines[first.lineno - 1 : first.end_lineno] = []
    kept = [line.strip() for line in lines]
    text = "\n".join(line for line in kept if line and not line.startswith("#"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def is_ours(method: Any) -> bool:
    """True for a method that a rewriter put on an instance."""
    return isinstance(method, types.MethodType) and method.__func__.__module__.startswith(f"{PACKAGE}.")


def is_rewritten(module: nn.Module) -> bool:
    """True if a rewriter has put a method on ``module``."""
    return any(is_ours(value) for value in vars(module).values())
