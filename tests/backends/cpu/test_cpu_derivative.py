"""Rules of differentiation: the emitted formulas, evaluated in f64, against autograd and against differences."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from moec.backends.calls import UnsupportedError
from moec.backends.cpu.derivative import RULES, compile_derivative
from moec.backends.cpu.expression import OPS
from moec.ir.core import Graph, Op, Value
from moec.ir.types import TensorType
from tests.backends.cases import call, close

ROW = TensorType.of("f32", "R", 64)
F = torch.nn.functional
TESTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "GE_OQ": torch.ge, "LE_OQ": torch.le, "GT_OQ": torch.gt, "LT_OQ": torch.lt, "EQ_OQ": torch.eq,
    "NLE_UQ": lambda a, b: ~(a <= b),
}  # fmt: skip
HOST: dict[str, object] = {
    "where": lambda test, a, b, yes, no: torch.where(TESTS[test](a, b), yes, no),
    "zero": lambda: torch.zeros((), dtype=torch.float64),
    "set1": lambda v: torch.tensor(v, dtype=torch.float64),
    "negate": torch.neg, "absolute": torch.abs, "root": torch.sqrt, "exp": torch.exp, "tanh": torch.tanh,
    "erf": torch.erf, "sigmoid": torch.sigmoid, "silu": F.silu, "relu": torch.relu, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "minimum": torch.minimum, "maximum": torch.maximum,
    "at_least": torch.maximum, "at_most": torch.minimum,
}  # fmt: skip


def evaluate(body: str, g: Tensor, u: Tensor, da: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The C++ statements as Python."""
    names = {**HOST, "g": g, "u": u, "da": da}
    for line in body.splitlines():
        text = line.strip().removeprefix("V ").removesuffix(";")
        text = re.sub(r"round_to<\w+>", "", text)
        text = re.sub(r"where<_CMP_(\w+)>\(", r'where("\1", ', text)
        text = re.sub(r"\(float\)(-?0x[0-9a-f.]+p[-+]\d+)", lambda m: repr(float.fromhex(m[1])), text)
        exec(re.sub(r"(\d\.\d+)f\b", r"\1", text), names)
    a, dg, du = (names[n] + torch.zeros_like(g) for n in ("a", "dg", "du"))  # type: ignore[operator]
    return a, dg, du


Make = Callable[[Graph, Value, Value], Value]


def region(make: Make) -> Graph:
    graph = Graph("activation")
    g, u = graph.add_arg(ROW), graph.add_arg(ROW)
    return close(graph, make(graph, g, u))


def unary(name: str) -> Make:
    return lambda graph, g, u: call(graph, f"{name}.default", g)


def with_keywords(name: str, *args: object, **kwargs: object) -> Make:
    def make(graph: Graph, g: Value, u: Value) -> Value:
        value = call(graph, name, g, *[u if a == "u" else a for a in args])
        old = value.op
        assert old is not None
        new = Op("torch.call", old.operands, [ROW], attrs={**old.attrs, "kwargs": kwargs})
        return graph.append(new).result

    return make


def one(name: str, g: Tensor, u: Tensor) -> Tensor:
    result: Tensor = getattr(F if name in ("silu", "gelu") else torch, name)(g)
    return result


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# name of the rule: the traced op, and the same in torch
RULE_CASES: dict[str, tuple[Make, Callable[[Tensor, Tensor], Tensor]]] = {
    **{n: (unary(n), partial(one, n))
       for n in ("silu", "relu", "sigmoid", "tanh", "exp", "erf", "gelu", "neg", "abs", "sqrt", "rsqrt", "reciprocal",
                 "square", "clone", "detach")},
    **{n: (unary(n), lambda g, u: g * 1.0) for n in ("_to_copy", "to", "convert_element_type", "alias", "contiguous")},
    "gelu_tanh": (with_keywords("gelu.default", approximate="tanh"), lambda g, u: gelu_tanh(g)),
    "pow2": (lambda r, g, u: call(r, "pow.Tensor_Scalar", g, 2), lambda g, u: g**2),
    "pow3": (lambda r, g, u: call(r, "pow.Tensor_Scalar", g, 3), lambda g, u: g**3),
    "mul": (lambda r, g, u: call(r, "mul.Tensor", g, u), torch.mul),
    "div": (lambda r, g, u: call(r, "div.Tensor", g, u), torch.div),
    "add": (with_keywords("add.Tensor", "u", alpha=0.5), lambda g, u: torch.add(g, u, alpha=0.5)),
    "sub": (with_keywords("sub.Tensor", "u", alpha=-2), lambda g, u: torch.sub(g, u, alpha=-2)),
    "rsub": (with_keywords("rsub.Tensor", "u", alpha=3), lambda g, u: torch.rsub(g, u, alpha=3)),
    "minimum": (lambda r, g, u: call(r, "minimum.default", g, u), torch.minimum),
    "maximum": (lambda r, g, u: call(r, "maximum.default", g, u), torch.maximum),
    "clamp": (with_keywords("clamp.default", min=0.5, max=1.25), lambda g, u: g.clamp(0.5, 1.25)),
    "clamp_min": (lambda r, g, u: call(r, "clamp_min.default", g, 1.0), lambda g, u: g.clamp_min(1.0)),
    "clamp_max": (lambda r, g, u: call(r, "clamp_max.default", g, 1.0), lambda g, u: g.clamp_max(1.0)),
    "hardtanh": (lambda r, g, u: call(r, "hardtanh.default", g), lambda g, u: F.hardtanh(g)),
}  # fmt: skip


def check(make: Make, function: Callable[[Tensor, Tensor], Tensor], g: Tensor, u: Tensor) -> None:
    g, u = g.double().requires_grad_(), u.double().requires_grad_()
    da = torch.randn(g.shape, dtype=torch.float64)
    body = compile_derivative(region(make), 2, "f32")
    want = function(g, u)
    a, *got = evaluate(body, g.detach(), u.detach(), da)
    torch.testing.assert_close(a, want.detach(), rtol=1e-6, atol=1e-9)
    grads = [torch.zeros_like(g)] * 2
    if want.requires_grad:
        grads = list(torch.autograd.grad(want, [g, u], da, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(got, grads, rtol=1e-6, atol=1e-9)


def test_every_supported_op_has_a_tested_rule() -> None:
    assert set(RULES) == set(OPS) == set(RULE_CASES)


@pytest.mark.parametrize("name", sorted(RULE_CASES))
def test_rules_are_autograds(name: str) -> None:
    make, function = RULE_CASES[name]
    positive = torch.rand(200).double() * 2 + 0.1
    check(make, (lambda g, u: g.detach()) if name == "detach" else function, positive, positive.flip(0))
    if name not in ("sqrt", "rsqrt"):
        check(make, (lambda g, u: g.detach()) if name == "detach" else function, torch.randn(200), torch.randn(200))


@pytest.mark.parametrize("name", sorted(set(RULE_CASES) - {"detach"}))
def test_rules_are_differences(name: str) -> None:
    torch.manual_seed(1)
    body = compile_derivative(region(RULE_CASES[name][0]), 2, "f32")
    g, u, h = torch.rand(200).double() * 2 + 0.1, torch.rand(200).double() * 2 + 0.1, 1e-6
    one = torch.ones_like(g)
    _, dg, du = evaluate(body, g, u, one)
    smooth = (g - u).abs().minimum((g - 0.5).abs()).minimum((g - 1).abs()).minimum((g - 1.25).abs()) > 2 * h
    for got, step in ((dg, (h, 0.0)), (du, (0.0, h))):
        up, down = (evaluate(body, g + s * step[0], u + s * step[1], one)[0] for s in (1, -1))
        torch.testing.assert_close(got[smooth], ((up - down) / (2 * h))[smooth], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "abs", "clamp", "clamp_min", "clamp_max", "hardtanh", "minimum", "maximum"])
def test_kinks_are_torchs(name: str) -> None:
    make, function = RULE_CASES[name]
    points = torch.tensor([0.0, -0.0, 0.5, 1.0, 1.25, -1.0, math.inf, -math.inf])
    check(make, function, points, points)


def swiglu_oai(graph: Graph, g: Value, u: Value) -> Value:
    gate, up = call(graph, "clamp_max.default", g, 0.75), call(graph, "hardtanh.default", u, -0.75, 0.75)
    glu = call(graph, "mul.Tensor", gate, call(graph, "sigmoid.default", call(graph, "mul.Tensor", gate, 1.702)))
    return call(graph, "mul.Tensor", call(graph, "add.Tensor", up, 1), glu)


def test_values_used_twice_add_their_shares() -> None:
    def function(g: Tensor, u: Tensor) -> Tensor:
        gate = g.clamp_max(0.75)
        return (F.hardtanh(u, -0.75, 0.75) + 1) * gate * torch.sigmoid(gate * 1.702)

    check(swiglu_oai, function, torch.randn(300), torch.randn(300))
    check(lambda r, g, u: call(r, "mul.Tensor", g, call(r, "mul.Tensor", g, g)), lambda g, u: g**3, *torch.randn(2, 50))


def test_an_unused_row_and_a_detached_one_get_zero() -> None:
    body = compile_derivative(region(lambda r, g, u: call(r, "mul.Tensor", g, call(r, "detach.default", u))), 2, "f32")
    g, u, da = torch.randn(3, 20).double()
    _, dg, du = evaluate(body, g, u, da)
    torch.testing.assert_close(dg, da * u)
    assert not du.any()
    assert "du = (zero());" in compile_derivative(region(unary("silu")), 2, "f32")


def test_bounds_that_move_have_no_rule() -> None:
    for make in (
        lambda r, g, u: call(r, "clamp_max.Tensor", g, u),
        with_keywords("clamp.Tensor", "u"),
    ):
        with pytest.raises(UnsupportedError, match="bounds that depend on its rows"):
            compile_derivative(region(make), 2, "f32")
