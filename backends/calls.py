"""Reading the elementwise ops of a traced region, for backends that write them down as expressions of a language."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moec.ir.attributes import Operand
from moec.ir.core import Op, Value


class UnsupportedError(Exception):
    """A region or an op that a code generator has no form for; the message says which op, as the end of a sentence."""


@dataclass(frozen=True)
class Call:
    """One op of a region, ready to be written down.

    Attributes:
        target: The traced op, for messages.
        name: Its name in a table of expressions; ``gelu_tanh``, ``pow2`` and ``pow3`` stand for ops with arguments.
        args, kwargs: Names and numbers in the language; an argument that is None is the empty text.
        sources: The value behind each positional argument; None for numbers.
        named: The values behind keyword arguments.
    """

    target: str
    name: str
    args: list[str]
    sources: list[Value | None]
    kwargs: dict[str, str] = field(default_factory=dict)
    named: list[Value] = field(default_factory=list)


Emit = Callable[[list[str], dict[str, str]], str]
"""An expression of a language from a call's arguments and keyword arguments."""

FIRST_ALONE = ("_to_copy", "to", "convert_element_type", "clone", "alias", "detach", "contiguous")
"""Ops that give their first argument, in the type of their result."""
_POWERS = {2: "pow2", 3: "pow3", 0.5: "sqrt", -0.5: "rsqrt"}
_SHARED_BY_OVERLOADS = {"default", "Tensor", "Scalar", "dtype", "self", "other", "Tensor_Scalar"}


def emit_alpha(symbol: str) -> Emit:
    """``a + b * alpha``, as ``aten.add`` and ``aten.sub`` have it."""

    def emit(a: list[str], kw: dict[str, str]) -> str:
        alpha = kw.get("alpha")
        return f"{a[0]} {symbol} {a[1]}" if alpha is None else f"{a[0]} {symbol} {a[1]} * {alpha}"

    return emit


def emit_clamp(a: list[str], kw: dict[str, str]) -> str:
    """Between ``min`` and ``max``; either may be missing."""
    low = kw.get("min", a[1] if len(a) > 1 else "")
    high = kw.get("max", a[2] if len(a) > 2 else "")
    text = f"at_least({a[0]}, {low})" if low else a[0]
    return f"at_most({text}, {high})" if high else text


def emit_function(name: str, arity: int = 1) -> Emit:
    """A call of the language's own function of that name."""
    return lambda a, kw: f"{name}({', '.join(a[:arity])})"


def emit_binary(symbol: str) -> Emit:
    """An operator between two arguments."""
    return lambda a, kw: f"{a[0]} {symbol} {a[1]}"


def emit_same(a: list[str], kw: dict[str, str]) -> str:
    """The first argument as it is."""
    return a[0]


@dataclass(frozen=True)
class Language:
    """What a backend writes elementwise ops in.

    Attributes:
        types: Element types that its kernels read and write, and their names.
        ops: An expression for every op that a region may call.
        number: A number.
        most_arguments: Ops whose further arguments must have their defaults, and how many they are written with.
    """

    types: Mapping[str, str]
    ops: Mapping[str, Emit]
    number: Callable[[float], str]
    most_arguments: Mapping[str, int] = field(default_factory=dict)

    def spell(self, name: str, *args: str) -> str:
        """The expression of the op called ``name``."""
        return self.ops[name](list(args), {})

    def expression(self, op: Op, names: Mapping[Value, str], where: str) -> str:
        """The expression of an elementwise op; see :meth:`read_call`."""
        call = self.read_call(op, names, where)
        return self.ops[call.name](call.args, call.kwargs)

    def read_call(self, op: Op, names: Mapping[Value, str], where: str) -> Call:
        """The op's name and arguments.

        Args:
            op: An op of a region.
            names: What each value is called.
            where: What the op is part of, for messages.

        Raises:
            UnsupportedError: The language has no form for it, or for its arguments.
        """
        target = str(op.attrs.get("target", op.name))
        namespace, _, rest = target.partition(".")
        name, _, overload = rest.partition(".")

        def text(value: Any) -> str:
            if isinstance(value, Operand):
                return names[op.operands[value.index]]
            if value is None:
                return ""
            if isinstance(value, (bool, int, float)):
                return self.number(value)
            raise UnsupportedError(f"{where} calls {target} with {value!r}")

        def source(value: Any) -> Value | None:
            return op.operands[value.index] if isinstance(value, Operand) else None

        args: Sequence[Any] = op.attrs.get("args", ())
        kwargs: dict[str, Any] = dict(op.attrs.get("kwargs", {}))
        readable = namespace in ("aten", "prims") and overload in _SHARED_BY_OVERLOADS and not op.regions
        if name == "gelu":
            name = "gelu_tanh" if kwargs.pop("approximate", "none") == "tanh" else name
        if name == "pow" and len(args) == 2 and args[1] in _POWERS:
            name, args = _POWERS[args[1]], args[:1]
        if not readable or name not in self.ops:
            raise UnsupportedError(f"{where} calls {target}")
        if name in FIRST_ALONE:
            args, kwargs = args[:1], {}
        if kwargs.keys() - {"alpha", "min", "max"}:
            raise UnsupportedError(f"{where} calls {target} with {', '.join(kwargs)}")
        if name == "hardtanh" and len(args) + len(kwargs) < 3:
            args = (*args, -1.0, 1.0)[:3] if len(args) == 1 else (*args, 1.0)
        if len(args) > self.most_arguments.get(name, len(args)):
            raise UnsupportedError(f"{where} calls {target} with other arguments than its defaults")
        return Call(
            target,
            name,
            [text(a) for a in args],
            [source(a) for a in args],
            {k: text(v) for k, v in kwargs.items() if v is not None},
            [v for v in map(source, kwargs.values()) if v is not None],
        )
