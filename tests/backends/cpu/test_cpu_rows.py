"""Functions of whole rows in the cpu backend: activations with norms, and functions after the down GEMM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moec.backends.calls import UnsupportedError
from moec.backends.cpu.row_function import compile_rows
from moec.backends.reference import run_graph
from moec.ir.attributes import Operand
from moec.ir.core import Graph, Op, Value
from moec.ir.types import TensorType
from tests.backends.cases import SKEWS, TOLERANCE, ExpertsCase, call, case_id, close, loop_experts, relative_error
from tests.backends.cpu.kernels import BACKEND, HERE, TOKENS, load, needs_kernels

pytestmark = needs_kernels
Region = Callable[[Graph, Value], Value]
CASES = [
    (ExpertsCase(layout="rows", hidden=37, inner=19, bias=True, captures=True), 0),
    (ExpertsCase(layout="rows", hidden=33, inner=75, dtype="bf16", weight_dtype="f32", sentinels=True), -1),
    (ExpertsCase(layout="rows", hidden=21, inner=35, dtype="f16", up_form="kn", down_form="kn", post=True), -1),
    (ExpertsCase(layout="interleaved", hidden=39, inner=22, bias=True, post=True, sentinels=True), 0),
    (ExpertsCase(layout="separate", hidden=45, inner=70, dtype="bf16", stacked=False, post=True), -1),
]


@pytest.mark.parametrize(("case", "level"), CASES, ids=lambda v: case_id(v) if isinstance(v, ExpertsCase) else "")
def test_rows_and_post_are_the_loop(case: ExpertsCase, level: int) -> None:
    kernel = load(case.graph(), f"cpu:{HERE[level]}")
    for tokens in TOKENS:
        for skew in SKEWS:
            inputs = case.inputs(tokens, skew)
            got = kernel.forward(inputs)[0]
            assert relative_error(got, loop_experts(case, inputs)) <= TOLERANCE[case.dtype], (tokens, skew)


def reduce(g: Graph, target: str, rows: Value, *more: object) -> Value:
    return call(g, target, rows, [-1], *more, width=TensorType.of("f32", 1).shape[0])


def columns(width: int) -> object:
    return TensorType.of("f32", width).shape[0]


def cast(g: Graph, value: Value, dtype: str) -> Value:
    type = value.type
    assert isinstance(type, TensorType)
    wide = TensorType.of(dtype, *type.shape)
    attrs = {"target": "aten._to_copy.default", "args": (Operand(0),), "kwargs": {"dtype": wide.dtype}}
    return g.append(Op("torch.call", [value], [wide], attrs=attrs)).result


def pieces(g: Graph, target: str, rows: Value, widths: list[int], *args: object) -> list[Value]:
    types = [TensorType.of(rows.type.dtype.name, "R", w) for w in widths]
    template = (Operand(0), *args)
    return list(g.append(Op("torch.call", [rows], types, attrs={"target": f"aten.{target}", "args": template})).results)


def norm_then_gate(g: Graph, h: Value) -> Value:
    """Norm of all columns in f32, then silu of one half times the other."""
    wide = cast(g, h, "f32")
    mean = reduce(g, "mean.dim", call(g, "pow.Tensor_Scalar", wide, 2), True)
    unit = call(g, "mul.Tensor", wide, call(g, "pow.Tensor_Scalar", call(g, "add.Tensor", mean, 1e-5), -0.5))
    back = cast(g, unit, h.type.dtype.name)
    gate, up = pieces(g, "chunk.default", back, [11, 11], 2, -1)
    return call(g, "mul.Tensor", call(g, "silu.default", gate), up)


def softmax_of_even(g: Graph, h: Value) -> Value:
    even = call(g, "slice.Tensor", h, 1, 0, None, 2, width=columns(11))
    odd = call(g, "slice.Tensor", h, -1, 1, 22, 2, width=columns(11))
    share = call(g, "softmax.int", even, -1)
    return call(g, "add.Tensor", share, call(g, "div.Tensor", odd, reduce(g, "amax.default", odd, True)))


def norms_of_pieces(g: Graph, h: Value) -> Value:
    """Pieces of unequal widths, each with its own norm, in another order, and a slice of all that."""
    first, second = pieces(g, "split_with_sizes.default", h, [5, 17], (5, 17), 1)
    a = call(g, "layer_norm.default", first, [5])
    b = call(g, "rms_norm.default", second, [17])
    type = TensorType.of(h.type.dtype.name, "R", 22)
    template = ([Operand(0), Operand(1)], 1)
    both = g.append(Op("torch.call", [b, a], [type], attrs={"target": "aten.cat.default", "args": template})).result
    spread = call(g, "slice.Tensor", both, 1, 8, 19, width=columns(11))
    return call(g, "sub.Tensor", spread, reduce(g, "amin.default", both, True))


def variance(g: Graph, h: Value) -> Value:
    """Numbers of a row without their own dimension, and computed from two reductions."""
    half = call(g, "slice.Tensor", h, 1, -11, None, width=columns(11))
    attrs = {"target": "aten.var.correction", "args": (Operand(0), [1]), "kwargs": {"correction": 0, "keepdim": True}}
    one = TensorType.of(h.type.dtype.name, "R", 1)
    var = g.append(Op("torch.call", [half], [one], attrs=attrs)).result
    flat = TensorType.of(h.type.dtype.name, "R")
    attrs = {"target": "aten.sum.dim_IntList", "args": (Operand(0), [-1])}
    total = g.append(Op("torch.call", [call(g, "abs.default", h)], [flat], attrs=attrs)).result
    size = call(g, "linalg_vector_norm.default", half, 2, [-1], True, width=columns(1))
    attrs = {"target": "aten.unsqueeze.default", "args": (Operand(0), -1)}
    column = g.append(Op("torch.call", [call(g, "add.Tensor", total, 1.0)], [one], attrs=attrs)).result
    return call(g, "div.Tensor", half, call(g, "add.Tensor", call(g, "add.Tensor", column, var), size))


REGIONS = [norm_then_gate, softmax_of_even, norms_of_pieces, variance]


def program(case: ExpertsCase, function: Region) -> tuple[Graph, ExpertsCase]:
    """A program whose up GEMM gives 22 columns, of which ``function`` makes 11."""
    source = replace(case, layout="concat", inner=11)
    graph = source.graph()
    region = Graph("activation")
    close(region, function(region, region.add_arg(TensorType.of(case.dtype, "R", 22))))
    op = graph.ops[0]
    op.regions[0] = region
    op.attrs["layout"] = "rows"
    return graph, source


@pytest.mark.parametrize(("dtype", "level"), [("f32", 0), ("bf16", -1)])
@pytest.mark.parametrize("function", REGIONS, ids=lambda f: f.__name__)
def test_programs_of_rows_are_the_traced_ones(function: Region, dtype: str, level: int) -> None:
    graph, case = program(ExpertsCase(dtype=dtype, weight_dtype="f32", bias=True), function)
    kernel = load(graph, f"cpu:{HERE[level]}")
    for tokens in (1, 33):
        inputs = case.inputs(tokens)
        assert relative_error(kernel.forward(inputs)[0], run_graph(graph, inputs)[0]) <= TOLERANCE[dtype]


def test_a_post_region_may_change_width_and_type() -> None:
    case = ExpertsCase(hidden=22, dtype="bf16", weight_dtype="f32", post=True)
    graph = case.graph()
    op = graph.ops[0]
    region = Graph("post")
    o, scale = region.add_arg(TensorType.of("bf16", "R", 22)), region.add_arg(TensorType.of("bf16", 22))
    first, second = pieces(region, "chunk.default", call(region, "mul.Tensor", o, scale), [11, 11], 2, 1)
    wide = [cast(region, v, "f32") for v in (first, second)]
    close(region, call(region, "maximum.default", *wide))
    op.regions[1] = region
    op.results[0].type = TensorType.of("f32", "T", 11)
    inputs = case.inputs(7)
    got, want = load(graph).forward(inputs)[0], run_graph(graph, inputs)[0]
    assert got.dtype == want.dtype == torch.float32
    assert relative_error(got, want) <= TOLERANCE["bf16"]


@pytest.mark.parametrize("level", [0, -1])
def test_a_token_has_the_same_bits_whatever_its_mates_and_the_threads(level: int) -> None:
    case = ExpertsCase(layout="rows", hidden=150, inner=90, dtype="bf16", weight_dtype="f32", post=True)
    kernel, inputs = load(case.graph(), f"cpu:{HERE[level]}"), case.inputs(41)
    torch.set_num_threads(1)
    whole = kernel.forward(inputs)[0]
    for cut in (slice(0, 1), slice(7, 9), slice(3, 40)):
        assert torch.equal(kernel.forward([t[cut] for t in inputs[:3]] + inputs[3:])[0], whole[cut]), cut
    many = [torch.cat([t] * 20) for t in inputs[:3]] + inputs[3:]
    assert torch.equal(kernel.forward(many)[0], torch.cat([whole] * 20))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(kernel.forward(inputs)[0], whole)
        assert torch.equal(kernel.forward(many)[0][: len(whole)], whole)


@pytest.mark.parametrize("function", [softmax_of_even, norm_then_gate], ids=lambda f: f.__name__)
def test_infinities_and_nan_do_as_in_torch(function: Region) -> None:
    graph, case = program(ExpertsCase(hidden=4, experts=1, top_k=1), function)
    kernel = load(graph)
    inputs = case.inputs(4)
    inputs[0] = torch.eye(4) * torch.tensor([1.0, torch.inf, -torch.inf, torch.nan])
    inputs[4].zero_()[:, 0] = 1  # the first activation alone, so that a finite one is seen
    want = run_graph(graph, inputs)[0]
    torch.testing.assert_close(kernel.forward(inputs)[0].isnan(), want.isnan())
    inputs[0] = torch.full((4, 4), 1e30)
    assert torch.equal(kernel.forward(inputs)[0].isnan(), run_graph(graph, inputs)[0].isnan())


def rejected(build: Callable[[Graph, Value], Value], dtype: str = "f32") -> str:
    g = Graph("activation")
    close(g, build(g, g.add_arg(TensorType.of(dtype, "R", 8))))
    with pytest.raises(UnsupportedError) as refused:
        compile_rows(g, "the activation")
    return str(refused.value)


def test_what_is_no_function_of_a_row_is_refused() -> None:
    def over_rows(g: Graph, h: Value) -> Value:
        return call(g, "sub.Tensor", h, call(g, "mean.dim", h, [0], True))

    def matrix(g: Graph, h: Value) -> Value:
        return call(g, "mul.Tensor", h, g.add_arg(TensorType.of("f32", 3, 8)))

    def turned(g: Graph, h: Value) -> Value:
        flat = TensorType.of("f32", "R")
        attrs = {"target": "aten.sum.dim_IntList", "args": (Operand(0), [-1])}
        return call(g, "mul.Tensor", h, g.append(Op("torch.call", [h], [flat], attrs=attrs)).result)

    def one_number(g: Graph, h: Value) -> Value:
        return reduce(g, "mean.dim", h, True)

    assert "aten.mean.dim along another dimension" in rejected(over_rows)
    assert "captured tensor of shape [3, 8]" in rejected(matrix)
    assert "rows of different shapes" in rejected(turned)
    assert "no rows" in rejected(one_number)
    assert "aten.cumsum.default" in rejected(lambda g, h: call(g, "cumsum.default", h, -1))
    assert "aten.logcumsumexp" in rejected(lambda g, h: call(g, "logcumsumexp.default", h, -1))
    assert "another order" in rejected(
        lambda g, h: call(g, "div.Tensor", h, call(g, "linalg_vector_norm.default", h, 1, [-1], True, width=columns(1)))
    )
    assert "f64" in rejected(lambda g, h: cast(g, h, "f64"))
    assert "1 column" in rejected(lambda g, h: call(g, "slice.Tensor", h, 1, 0, 1, width=columns(1)))


def test_widths_that_do_not_meet_are_refused() -> None:
    graph, _ = program(ExpertsCase(), lambda g, h: call(g, "relu.default", h))
    assert "gives f32 x 22, the down GEMM takes f32 x 11" in BACKEND.supports(graph.ops[0], "cpu").reason
    graph, _ = program(ExpertsCase(), norm_then_gate)
    region = Graph("activation")
    close(region, call(region, "relu.default", region.add_arg(TensorType.of("f32", "R", 11))))
    graph.ops[0].regions[0] = region
    assert "gives 22 columns where 11 are taken" in BACKEND.supports(graph.ops[0], "cpu").reason
