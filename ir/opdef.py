"""Definitions of ops and their registry. One op, one file under ``ir/ops/`` (or in a third-party package).

A definition says what an op takes and gives, checks it, infers its result types, and *executes* it with plain torch
operations: ``evaluate`` is the op's meaning. The reference interpreter is a loop over ``evaluate``, so a backend has
an oracle the moment an op exists.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from moec.ir.attributes import ListAttr, Operand, Region
from moec.ir.errors import IRError, VerifyError, nearest

if TYPE_CHECKING:
    import torch

    from moec.ir.core import Graph, Op
    from moec.ir.types import Type


@dataclass(frozen=True)
class OperandDef:
    """A named operand group. ``arity`` is ``one`` (``%x``), ``optional`` (``bias = %b``) or ``many`` (``[%a, %b]``)."""

    name: str
    arity: str = "one"
    doc: str = ""


@dataclass(frozen=True)
class AttrDef:
    """A named attribute. A ``default`` other than ``REQUIRED`` makes it optional, and it is not printed when equal."""

    name: str
    kind: str  # "int" | "float" | "bool" | "str" | "dtype" | "any"
    doc: str = ""
    default: Any = "__required__"
    choices: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        return isinstance(self.default, str) and self.default == "__required__"


@dataclass(frozen=True)
class RegionDef:
    """A named nested graph; ``optional`` ones may be absent (they come last)."""

    name: str
    doc: str = ""
    optional: bool = False


class OpDef:
    """Base class of op definitions. Subclasses are stateless; the class docstring is the op's reference page.

    Attributes:
        name: ``dialect.op``.
        operands, attrs, regions: What the op takes; ``results`` names what it gives.
        variadic_results: True if the op may have any number of results, whatever ``results`` says.
        pure: False if it must keep its place and may not be removed, duplicated or reordered.
    """

    name: ClassVar[str]
    operands: ClassVar[tuple[OperandDef, ...]] = ()
    attrs: ClassVar[tuple[AttrDef, ...]] = ()
    regions: ClassVar[tuple[RegionDef, ...]] = ()
    results: ClassVar[tuple[str, ...]] = ("result",)
    variadic_results: ClassVar[bool] = False
    pure: ClassVar[bool] = True

    def group_index(self, name: str) -> int:
        for i, o in enumerate(self.operands):
            if o.name == name:
                return i
        raise IRError(f"{self.name} has no operand called {name!r}; {nearest(name, [o.name for o in self.operands])}")

    def attr(self, op: Op, name: str) -> Any:
        """The attribute ``name`` of ``op``, or its default."""
        if name in op.attrs:
            return op.attrs[name]
        for a in self.attrs:
            if a.name == name and not a.required:
                return a.default
        raise IRError(f"{self.name}: attribute {name!r} is missing")

    def region(self, op: Op, name: str) -> Graph | None:
        """The nested graph called ``name``, or None if it is absent."""
        for i, r in enumerate(self.regions):
            if r.name == name:
                return op.regions[i] if i < len(op.regions) else None
        raise IRError(f"{self.name} has no region called {name!r}")

    def is_pure(self, op: Op) -> bool:
        return self.pure

    def infer(self, op: Op) -> Sequence[Type] | None:
        """The result types that the operands and attributes imply, or None if they are free."""
        return None

    def verify(self, op: Op) -> None:
        """Check what the declarations cannot say. Call ``self.fail`` on a violation."""

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        """Execute on torch tensors (flat operand values). ``run`` executes a nested graph. One entry per result."""
        raise NotImplementedError(f"{self.name} has no executable meaning")

    def fail(self, op: Op, message: str) -> NoReturn:
        raise VerifyError(f"{self.name}: {message}", op=repr(op), source=op.loc.source or None)


def check_template(definition: OpDef, op: Op, template: Any) -> None:
    """Check that an argument template names every operand, and no operand or region that the op lacks."""
    places: list[Operand | Region] = []
    stack = [template]
    while stack:
        match stack.pop():
            case Operand() | Region() as place:
                places.append(place)
            case ListAttr(items=items):
                stack.extend(items)
            case tuple() as items:
                stack.extend(items)
            case dict() as items:
                stack.extend(items.values())
    for place in places:
        kind, count = ("operand", len(op.operands)) if isinstance(place, Operand) else ("region", len(op.regions))
        if not 0 <= place.index < count:
            definition.fail(op, f"the template names {kind} {place.index}, there are {count}")
    unused = set(range(len(op.operands))) - {p.index for p in places if isinstance(p, Operand)}
    if unused:
        definition.fail(op, f"operand {min(unused)} has no place in the template")


OP_DEFS: dict[str, OpDef] = {}


def register_op(cls: type[OpDef]) -> type[OpDef]:
    """Class decorator that enters an op definition into the registry.

    Raises:
        IRError: Another op has that name already.
    """
    other = OP_DEFS.get(cls.name)
    if other is not None and type(other).__qualname__ != cls.__qualname__:
        raise IRError(f"op {cls.name!r} is registered twice: {type(other).__module__} and {cls.__module__}")
    OP_DEFS[cls.name] = cls()
    return cls


@cache
def _load_builtin() -> None:
    package = importlib.import_module("moec.ir.ops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"moec.ir.ops.{module.name}")


def op_def(name: str) -> OpDef:
    """The definition of op ``name``.

    Raises:
        IRError: Unknown op; the message names the nearest ones.
    """
    _load_builtin()
    try:
        return OP_DEFS[name]
    except KeyError:
        raise IRError(f"unknown op {name!r}; {nearest(name, OP_DEFS)}") from None


def find_op_def(name: str) -> OpDef | None:
    """The definition of op ``name``, or None if no such op is registered."""
    _load_builtin()
    return OP_DEFS.get(name)


def default_groups(name: str, count: int) -> tuple[int, ...]:
    """The sizes of the operand groups of op ``name`` where its maker gave a flat list of ``count`` operands.

    The only group of changing size takes what the others leave; where that does not decide, one operand each.
    """
    definition = OP_DEFS.get(name) or (find_op_def(name) if "." in name or name == "return" else None)
    if definition is not None:
        loose = [i for i, o in enumerate(definition.operands) if o.arity != "one"]
        rest = count - (len(definition.operands) - len(loose))
        if rest == 0 or (len(loose) == 1 and rest > 0):
            return tuple(rest if i in loose else 1 for i in range(len(definition.operands)))
    return (1,) * count


def all_op_defs() -> dict[str, OpDef]:
    """Every registered op by name, sorted."""
    _load_builtin()
    return dict(sorted(OP_DEFS.items()))


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of an IR element type's name."""
    from moec.ir.torch_dtypes import TO_TORCH  # torch is imported only when something is executed

    return TO_TORCH[name]
