"""The cpu backend's kernels against a plain loop in f64, and the promises on bits, updates and threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moec.backends.reference import run_graph
from moec.ir.core import Graph, Op, Value
from moec.ir.types import TensorType
from tests.backends.cases import SKEWS, TOLERANCE, ExpertsCase, call, case_id, close, loop_experts, relative_error
from tests.backends.cpu.kernels import BACKEND, HERE, TOKENS, load, needs_kernels

pytestmark = needs_kernels
Activation = Callable[[Graph, list[Value], TensorType], Value]
ODD = [
    ExpertsCase(hidden=37, inner=19, dtype="f32", bias=True),
    ExpertsCase(hidden=45, inner=70, dtype="bf16", weight_dtype="f32", layout="interleaved", bias=True, sentinels=True),
    ExpertsCase(hidden=33, inner=21, dtype="bf16", up_form="kn", down_form="kn", layout="interleaved", bias=True),
    ExpertsCase(hidden=21, inner=35, dtype="f16", up_form="kn", layout="separate", stacked=False, bias=True),
]


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("case", ODD, ids=case_id)
def test_odd_widths_are_the_loop(case: ExpertsCase, level: str) -> None:
    kernel = load(case.graph(), f"cpu:{level}")
    for tokens in TOKENS:
        for skew in SKEWS:
            inputs = case.inputs(tokens, skew)
            got = kernel.forward(inputs)[0]
            assert relative_error(got, loop_experts(case, inputs)) <= TOLERANCE[case.dtype], (tokens, skew)


@pytest.mark.parametrize(("dtype", "form"), [("f32", "nk"), ("bf16", "nk"), ("bf16", "kn")])
def test_long_rows_are_cut_alike(dtype: str, form: str) -> None:
    """Rows longer than what a tile holds at a time, with a last piece that is shorter."""
    case = ExpertsCase(hidden=2500, inner=40, dtype=dtype, weight_dtype="f32", up_form=form, experts=3, top_k=2)
    inputs = case.inputs(14)
    assert relative_error(load(case.graph()).forward(inputs)[0], loop_experts(case, inputs)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("dtype", "form", "level"),
    [("f32", "nk", HERE[0]), ("bf16", "kn", HERE[0]), ("f32", "kn", HERE[-1]), ("bf16", "nk", HERE[-1])]
    if HERE
    else [],
)
def test_a_token_has_the_same_bits_whatever_its_mates_and_the_threads(dtype: str, form: str, level: str) -> None:
    case = ExpertsCase(hidden=150, inner=90, dtype=dtype, weight_dtype="f32", up_form=form, down_form=form)
    kernel, inputs = load(case.graph(), f"cpu:{level}"), case.inputs(41)
    torch.set_num_threads(1)
    whole = kernel.forward(inputs)[0]
    for cut in (slice(0, 1), slice(7, 9), slice(5, 12), slice(3, 40)):
        few = [t[cut] for t in inputs[:3]] + inputs[3:]
        assert torch.equal(kernel.forward(few)[0], whole[cut]), cut
    many = [torch.cat([t] * 20) for t in inputs[:3]] + inputs[3:]
    assert torch.equal(kernel.forward(many)[0], torch.cat([whole] * 20))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(kernel.forward(inputs)[0], whole)
        assert torch.equal(kernel.forward(many)[0][: len(whole)], whole)


def test_experts_with_more_rows_than_one_task_takes() -> None:
    case = ExpertsCase(experts=2, top_k=1)
    inputs = case.inputs(1300, "one_expert")
    assert relative_error(load(case.graph()).forward(inputs)[0], loop_experts(case, inputs)) <= TOLERANCE["f32"]


def swiglu_oai(g: Graph, rows: list[Value], row: TensorType) -> Value:
    gate = call(g, "clamp.default", rows[0], None, 0.75)
    up = call(g, "clamp.default", rows[1], -0.75, 0.75)
    glu = call(g, "mul.Tensor", gate, call(g, "sigmoid.default", call(g, "mul.Tensor", gate, 1.702)))
    return call(g, "mul.Tensor", call(g, "add.Tensor", up, 1), glu)


def chain(g: Graph, rows: list[Value], row: TensorType) -> Value:
    a = call(g, "tanh.default", call(g, "sub.Tensor", rows[0], rows[1]))
    b = call(g, "exp.default", call(g, "neg.default", call(g, "abs.default", rows[1])))
    c = call(g, "div.Tensor", a, call(g, "add.Tensor", b, 0.5))
    d = call(g, "maximum.default", call(g, "minimum.default", c, rows[0]), call(g, "clamp_max.default", rows[1], 0.1))
    return call(g, "add.Tensor", d, call(g, "pow.Tensor_Scalar", call(g, "clamp_min.default", c, -0.2), 2))


def gelus(g: Graph, rows: list[Value], row: TensorType) -> Value:
    plain = call(g, "gelu.default", rows[0])
    op = Op("torch.call", [rows[1]], [row], attrs={**plain.op.attrs, "kwargs": {"approximate": "tanh"}})
    return call(g, "sub.Tensor", call(g, "relu.default", plain), g.append(op).result)


@pytest.mark.parametrize(("dtype", "level"), [("f32", 0), ("bf16", -1)])
@pytest.mark.parametrize("function", [swiglu_oai, chain, gelus], ids=lambda f: f.__name__)
def test_activations_are_the_traced_ones(function: Activation, dtype: str, level: int) -> None:
    case = ExpertsCase(dtype=dtype, weight_dtype="f32", hidden=32, inner=24)
    graph = case.graph()
    region = Graph("activation")
    row = TensorType.of(dtype, "R", case.inner)
    rows = [region.add_arg(row), region.add_arg(row)]
    close(region, function(region, rows, row))
    graph.ops[0].regions[0] = region
    inputs = case.inputs(33)
    inputs[3] *= 3
    want = run_graph(graph, inputs)[0]
    assert relative_error(load(graph, f"cpu:{HERE[level]}").forward(inputs)[0], want) <= TOLERANCE[dtype]


def test_infinities_and_nan_do_as_in_torch() -> None:
    case = ExpertsCase(hidden=4, inner=16, experts=1, top_k=1, layout="single")
    graph = case.graph()
    inputs = case.inputs(4)
    inputs[0] = torch.eye(4) * torch.tensor([1.0, torch.inf, -torch.inf, torch.nan])
    want = run_graph(graph, inputs)[0]
    torch.testing.assert_close(load(graph).forward(inputs)[0].isfinite(), want.isfinite())


def test_updated_weights_are_seen() -> None:
    case = ExpertsCase()
    kernel, inputs = load(case.graph()), case.inputs(5)
    before = kernel.forward(inputs)[0]
    inputs[4].mul_(2)
    torch.testing.assert_close(kernel.forward(inputs)[0], 2 * before)


@pytest.mark.parametrize("stacked", [True, False])
def test_weights_are_read_where_they_lie(stacked: bool) -> None:
    case = ExpertsCase(stacked=stacked, layout="separate")
    kernel, inputs = load(case.graph()), case.inputs(9)
    want = loop_experts(case, inputs)

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)

    def spread(t: Tensor) -> Tensor:  # no side is contiguous: aten takes the call
        return torch.stack([t, t], dim=-1)[..., 0]

    def padded(t: Tensor) -> Tensor:
        return torch.cat([t, t], dim=-1)[..., : t.shape[-1]]

    turn = iter(range(1000))

    def unlike(t: Tensor) -> Tensor:  # experts whose rows lie apart differently, where they are apart
        return (padded if next(turn) % 3 == 1 else torch.clone)(t)

    for change in (transposed, padded, spread, unlike):
        moved = inputs[:3] + [change(t) for t in inputs[3:]]
        assert relative_error(kernel.forward(moved)[0], want) <= TOLERANCE["f32"], change.__name__
    rows = [spread(inputs[0]), inputs[1].to(torch.int32), spread(inputs[2]), *inputs[3:]]
    assert relative_error(kernel.forward(rows)[0], want) <= TOLERANCE["f32"]


def test_eight_threads_at_once() -> None:
    case = ExpertsCase(dtype="bf16", hidden=64, inner=32)
    kernel = load(case.graph())
    torch.set_num_threads(2)
    jobs = [case.inputs(n, seed=n) for n in range(1, 9)]
    want = [kernel.forward(job)[0] for job in jobs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(kernel.forward(jobs[i])[0], want[i]):
                wrong.append(i)  # noqa: PERF401

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_what_it_does_not_take_has_a_reason() -> None:
    def reason(case: ExpertsCase, target: str = "cpu") -> str:
        support = BACKEND.supports(case.graph().ops[0], target)
        assert not support.ok
        return support.reason

    assert "f64" in reason(ExpertsCase(dtype="f64"))
    assert "no CPU" in reason(ExpertsCase(), "cuda:sm90")
    assert "cpu:neon" in reason(ExpertsCase(), "cpu:neon")
    graph = ExpertsCase().graph()
    region = Graph("activation")
    rows = [region.add_arg(TensorType.of("f32", "R", 8)) for _ in range(2)]
    close(region, call(region, "cumsum.default", rows[0], -1))
    graph.ops[0].regions[0] = region
    assert "aten.cumsum.default" in BACKEND.supports(graph.ops[0], "cpu").reason
