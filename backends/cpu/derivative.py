"""The derivative of an activation region as C++: reverse mode over the traced ops, one rule an op.

The region's own statements come first, rounded as they are traced. Gradients stay in f32, where torch rounds after
every op. At kinks the rules choose as torch's do: relu gives 0 at 0, clamp passes at its bounds, maximum gives half to
each of two equal operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from moec.backends.calls import Call, UnsupportedError
from moec.backends.cpu.expression import CPP, Activation, compile_activation, number
from moec.ir.core import Graph, Value

Rule = Callable[[list[str], dict[str, str], str, str], list[str]]
"""From arguments, keyword arguments, result and its gradient (all names or numbers) to the arguments' gradients."""

ONE = number(1.0)
HALF = number(0.5)


def _where(test: str, a: str, b: str, yes: str, no: str = "zero()") -> str:
    return f"where<_CMP_{test}>({a}, {b}, {yes}, {no})"


def _of_one(form: str) -> Rule:
    """A rule for one argument; in ``form`` x is the argument, y the result, d the gradient."""
    return lambda a, kw, y, d: [form.format(x=a[0], y=y, d=d, one=ONE, half=HALF)]


def _add(sign: str) -> Rule:
    def rule(a: list[str], kw: dict[str, str], y: str, d: str) -> list[str]:
        second = f"{d} * {kw['alpha']}" if "alpha" in kw else d
        return [d, second if sign == "+" else f"negate({second})"]

    return rule


def _rsub(a: list[str], kw: dict[str, str], y: str, d: str) -> list[str]:
    return [f"negate({d} * {kw['alpha']})" if "alpha" in kw else f"negate({d})", d]


def _clamp(a: list[str], kw: dict[str, str], y: str, d: str) -> list[str]:
    low = kw.get("min", a[1] if len(a) > 1 else "")
    high = kw.get("max", a[2] if len(a) > 2 else "")
    text = _where("GE_OQ", a[0], low, d) if low else d
    return [_where("LE_OQ", a[0], high, text) if high else text]


def _hardtanh(a: list[str], kw: dict[str, str], y: str, d: str) -> list[str]:
    low, high = kw.get("min", a[1]), kw.get("max", a[2])
    return [_where("GT_OQ", a[0], low, _where("LT_OQ", a[0], high, d))]


def _larger(test: str) -> Rule:
    def rule(a: list[str], kw: dict[str, str], y: str, d: str) -> list[str]:
        pairs = ((a[0], a[1]), (a[1], a[0]))
        return [_where("EQ_OQ", p, q, f"{d} * {HALF}", _where(test, p, q, d)) for p, q in pairs]

    return rule


def _stops(a: list[str], kw: dict[str, str], y: str, d: str) -> list[str]:
    return [""]


_T = f"tanh({number(math.sqrt(2 / math.pi))} * ({{x}} + {number(0.044715)} * {{x}} * {{x}} * {{x}}))"
RULES: dict[str, Rule] = {
    "silu": _of_one("{d} * sigmoid({x}) * ({one} + {x} * ({one} - sigmoid({x})))"),
    "relu": _of_one(_where("NLE_UQ", "{x}", "zero()", "{d}")),
    "sigmoid": _of_one("{d} * {y} * ({one} - {y})"),
    "tanh": _of_one("{d} * ({one} - {y} * {y})"),
    "exp": _of_one("{d} * {y}"),
    "erf": _of_one(f"{{d}} * {number(2 / math.sqrt(math.pi))} * exp(negate({{x}} * {{x}}))"),
    "gelu": _of_one(
        f"{{d}} * ({{half}} * ({{one}} + erf({{x}} * {number(math.sqrt(0.5))}))"
        f" + {{x}} * {number(1 / math.sqrt(2 * math.pi))} * exp({number(-0.5)} * {{x}} * {{x}}))"
    ),
    "gelu_tanh": _of_one(
        f"{{d}} * {{half}} * ({{one}} + {_T} + {{x}} * ({{one}} - {_T} * {_T}) * {number(math.sqrt(2 / math.pi))}"
        f" * ({{one}} + {number(3 * 0.044715)} * {{x}} * {{x}}))"
    ),
    "neg": _of_one("negate({d})"),
    "abs": _of_one(_where("GT_OQ", "{x}", "zero()", "{d}", _where("LT_OQ", "{x}", "zero()", "negate({d})"))),
    "sqrt": _of_one("{d} * {half} / {y}"),
    "rsqrt": _of_one("negate({half} * {d} * {y} * {y} * {y})"),
    "reciprocal": _of_one("negate({d} * {y} * {y})"),
    "square": _of_one("({d} + {d}) * {x}"),
    "pow2": _of_one("({d} + {d}) * {x}"),
    "pow3": _of_one(f"{{d}} * {number(3.0)} * {{x}} * {{x}}"),
    "mul": lambda a, kw, y, d: [f"{d} * {a[1]}", f"{d} * {a[0]}"],
    "div": lambda a, kw, y, d: [f"{d} / {a[1]}", f"negate({d} * {y} / {a[1]})"],
    "add": _add("+"),
    "sub": _add("-"),
    "rsub": _rsub,
    "minimum": _larger("LT_OQ"),
    "maximum": _larger("GT_OQ"),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda a, kw, y, d: [_where("LE_OQ", a[0], kw.get("max", a[1] if len(a) > 1 else ""), d)],
    "hardtanh": _hardtanh,
    "detach": _stops,
    **dict.fromkeys(("_to_copy", "to", "convert_element_type", "clone", "alias", "contiguous"), _of_one("{d}")),
}


def partials(call: Call, result: str, grad: str, moving: set[Value]) -> list[tuple[Value, str]]:
    """Gradients of the arguments in ``moving``; nothing for one whose gradient is always zero.

    Raises:
        UnsupportedError: There is no rule for the op, or none for one of these arguments.
    """
    rule = RULES.get(call.name)
    if rule is None:
        raise UnsupportedError(f"the activation calls {call.target}, which has no derivative here")
    texts = rule(call.args, call.kwargs, result, grad)
    wanted = [(i, v) for i, v in enumerate(call.sources) if v in moving]
    if any(i >= len(texts) for i, _ in wanted) or any(v in moving for v in call.named):
        raise UnsupportedError(f"the activation calls {call.target} with bounds that depend on its rows")
    return [(v, texts[i]) for i, v in wanted if v is not None and texts[i]]


def compile_derivative(region: Graph, rows: int, dtype: str) -> str:
    """The C++ body that sets ``a``, ``dg`` and ``du`` from ``g``, ``u`` and ``da``, the gradient of ``a``.

    Args:
        region: The activation, as ``compile_activation`` takes it.
        rows: 2 for gate and up; with 1 there is no ``du``.
        dtype: Element type of the result.

    Raises:
        UnsupportedError: The activation or the derivative of one of its ops has no vector form.
    """
    forward: Activation = compile_activation(region, rows, dtype)
    names = forward.names
    moving = set(region.args[:rows])
    ops = [op for op in region.ops if op is not region.terminator]
    for op in ops:
        if any(v in moving for v in op.operands):
            moving.add(op.result)
    (result,) = region.terminator.operands
    shares: dict[Value, list[str]] = {result: ["da"]}
    lines = [*forward.lines, f"a = {forward.result};"]
    for op in reversed(ops):
        if op.result not in shares or op.result not in moving:
            continue
        grad = f"d_{names[op.result]}"
        lines.append(f"V {grad} = {' + '.join(f'({s})' for s in shares[op.result])};")
        for value, text in partials(CPP.read_call(op, names, "the activation"), names[op.result], grad, moving):
            shares.setdefault(value, []).append(text)
    for arg, name in zip(region.args[:rows], ("dg", "du"), strict=False):
        lines.append(f"{name} = {' + '.join(f'({s})' for s in shares.get(arg, ['zero()']))};")
    return "\n        ".join(lines)
