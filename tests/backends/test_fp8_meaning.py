"""Layers whose weights are f8e4m3fn with scales: what they mean, what carries them, and what is no such layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from moec.backends.aten import AtenBackend
from moec.backends.base import program_op
from moec.backends.partition import claim
from moec.backends.reference import run_graph
from moec.backends.registry import get_backend
from moec.ir.core import Graph, Value
from moec.ir.errors import IRError
from moec.ir.parser import parse_graph
from moec.ir.types import TensorType
from moec.ir.verifier import verify
from tests.backends.cases import SKEWS, ExpertsCase, relative_error
from tests.backends.fp8 import fp8_row_value, fp8_weight_value

CASE = ExpertsCase(
    dtype="bf16", weight_dtype="f32", hidden=136, inner=144, experts=3, top_k=2, sentinels=True, fp8=True
)
"""Neither width is a multiple of 128, and up begins within a block of gate's."""
TOLERANCE = 8e-3
"""One unit in the last place of bf16: sums are taken in another order."""


def loop(case: ExpertsCase, inputs: list[Tensor]) -> Tensor:
    """The layer token by token, on what its numbers stand for."""
    x, ids, weights, up, down, up_scale, down_scale = inputs
    up, down = fp8_weight_value(up, up_scale), fp8_weight_value(down, down_scale)
    want = torch.zeros(len(x), case.hidden)
    for t, chosen in enumerate(ids.tolist()):
        for j, e in enumerate(chosen):
            if 0 <= e < case.experts:
                gate, value = (up[e] @ fp8_row_value(x[t])).to(x.dtype).chunk(2)
                want[t] += weights[t, j] * (down[e] @ fp8_row_value(silu(gate) * value)).to(x.dtype)
    return want.to(x.dtype)


@pytest.mark.parametrize("skew", SKEWS)
def test_the_reference_and_aten_are_the_loop(skew: str) -> None:
    graph = CASE.graph()
    kernel = AtenBackend().load(AtenBackend().lower(graph, "cpu"))
    for tokens in (0, 1, 9):
        inputs = CASE.inputs(tokens, skew)
        want = loop(CASE, inputs)
        assert relative_error(run_graph(graph, inputs)[0], want) <= TOLERANCE
        assert relative_error(kernel.forward(inputs)[0], want) <= TOLERANCE


def test_gradients_go_through_what_the_weights_stand_for() -> None:
    """Rows and router weights have gradients, as if rows had not been narrowed; weights and scales have none."""
    case = ExpertsCase(hidden=136, inner=144, experts=3, top_k=2, fp8=True)
    wide = ExpertsCase(hidden=136, inner=144, experts=3, top_k=2)
    inputs, grad = case.inputs(9), torch.randn(9, 136)
    kernel = AtenBackend().load(AtenBackend().lower(case.graph(), "cpu"))
    got = kernel.backward([grad], inputs, [True, False, True, False, False, False, False])
    plain = [*inputs[:3], *(fp8_weight_value(w, s) for w, s in zip(inputs[3:5], inputs[5:], strict=True))]
    other = AtenBackend().load(AtenBackend().lower(wide.graph(), "cpu"))
    want = other.backward([grad], plain, [True, False, True, False, False])
    for i in (0, 2):
        assert got[i] is not None
        assert relative_error(got[i], want[i]) <= 0.1, "no more apart than rows in fp8 are from rows"
    assert [g is None for g in got] == [False, True, False, True, True, True, True]


def test_the_text_says_the_scales() -> None:
    graph = CASE.graph()
    text = str(graph)
    assert "f8e4m3fn[3, 288, 136]" in text
    assert str(parse_graph(text)) == text
    verify(parse_graph(text))
    assert str(ExpertsCase().graph()).count("f32[5,") == 2, "a layer without scales is written as ever"


def test_who_takes_it() -> None:
    op = program_op(CASE.graph())
    claims = claim(CASE.graph(), ("cpu", "aten"), "cpu")
    assert [b.name for b in claims.values()] == ["aten"]
    assert get_backend("cpu").supports(op, "cpu").reason == (
        "its weights are fp8 with scales; aten multiplies what they stand for"
    )
    pytest.importorskip("triton")
    for target, reason in {
        "cuda:sm90": "", "cuda:sm100": "", "cuda:sm89": "", "cuda:sm80": "sm80 has no matrix instructions for fp8",
        "cuda:sm86": "sm86 has no matrix", "hip:gfx942": "gfx942 has f8e4m3fnuz",
    }.items():  # fmt: skip
        told = get_backend("triton").supports(op, target).reason
        assert told == "" if not reason else reason in told, target


def _retype(position: int, dtype: str, *shape: int) -> Callable[[Graph], Value]:
    def change(graph: Graph) -> Value:
        value = graph.args[position]
        value.type = TensorType.of(dtype, *shape)
        return value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_retype(3, "f8e5m2", 3, 288, 136), "is f8e5m2, not f8e4m3fn"),
        (_retype(3, "f8e4m3fnuz", 3, 288, 136), "is f8e4m3fnuz, not f8e4m3fn"),
        (_retype(3, "bf16", 3, 288, 136), "is bf16, not f8e4m3fn"),
        (_retype(5, "bf16", 3, 3, 2), "are bf16, not f32"),
        (_retype(5, "f32", 3, 5, 2), "one for 128 x 128 elements makes"),
        (_retype(5, "f32", 3, 288, 1), "one for 128 x 128 elements makes"),
        (_retype(6, "f32", 2, 2, 2), "one for 128 x 128 elements makes"),
    ],
)
def test_scales_that_are_no_scales(change: Callable[[Graph], Value], message: str) -> None:
    graph = CASE.graph()
    verify(graph)
    change(graph)
    with pytest.raises(IRError, match=message):
        verify(graph)


@pytest.mark.parametrize(
    ("form", "message"), [({"up_form": "kn"}, "their rows outputs"), ({"stacked": False}, "up holds 1 tensors")]
)
def test_weights_that_lie_otherwise(form: dict[str, object], message: str) -> None:
    graph = CASE.graph()
    graph.ops[0].attrs |= form
    with pytest.raises(IRError, match=message):
        verify(graph)


def test_one_scale_is_missing() -> None:
    text = str(CASE.graph())
    assert "[%5], [%6]" in text
    with pytest.raises(IRError, match="up and down weights have scales, or neither"):
        verify(parse_graph(text.replace("[%5], [%6]", "[%5]")))
