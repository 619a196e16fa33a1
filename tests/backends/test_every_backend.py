"""Every registered backend against the reference, on every kind of op it says it supports.

A backend is tested by being registered; one that cannot run on this machine is skipped with its own reason.
"""

from __future__ import annotations

import pytest
import torch

from moec.backends.base import Backend, Kernel, program_op
from moec.backends.reference import run_graph
from moec.backends.registry import all_backends
from moec.ir.core import Graph, Op
from moec.ir.types import PlanType, TensorType
from tests.backends.cases import SKEWS, TOLERANCE, ExpertsCase, case_id, relative_error, route_graph
from tests.support.backends import skip_unless_it_works

TOKENS = (0, 1, 2, 31, 33)
TARGET = "cpu"
LAYOUTS = ("concat", "interleaved", "separate", "single", "rows")
CASES = [
    ExpertsCase(layout=layout, bias=bias, dtype=dtype, weight_dtype="f32")
    for layout in LAYOUTS
    for bias in (False, True)
    for dtype in ("f32", "bf16", "f16")
] + [
    ExpertsCase(layout=layout, up_form="kn", down_form="kn", bias=True, dtype=dtype)
    for layout in LAYOUTS
    for dtype in ("f32", "bf16")
] + [
    ExpertsCase(layout="concat", hidden=64, inner=32, dtype="bf16"),
    ExpertsCase(layout="separate", stacked=False, bias=True),
    ExpertsCase(layout="concat", stacked=False, dtype="bf16", weight_dtype="f32"),
    ExpertsCase(captures=True, post=True),
    ExpertsCase(captures=True, post=True, bias=True, sentinels=True),
    ExpertsCase(sentinels=True, bias=True),
    ExpertsCase(sentinels=True, layout="separate", stacked=False, dtype="bf16"),
    ExpertsCase(top_k=5),
    ExpertsCase(top_k=1, experts=1),
    ExpertsCase(stacked=False, bias=True, sentinels=True, widths=(8, 40, 3, 1, 17)),
    ExpertsCase(layout="separate", up_form="kn", stacked=False, dtype="bf16", post=True, widths=(8, 40, 3, 1, 17)),
    ExpertsCase(dtype="bf16", weight_dtype="f32", hidden=136, inner=144, fp8=True),
]  # fmt: skip
ROUTERS = {
    "softmax": route_graph(8, k=2),
    "softmax_renorm_bf16": route_graph(8, "bf16", result="bf16", k=3, renormalize=True),
    "topk_first": route_graph(8, k=3, order="topk_first"),
    "sigmoid_groups": route_graph(
        8, bias=True, k=2, scoring="sigmoid", groups=4, top_groups=2, group_score="top2_sum", group_fill=0.0,
        renormalize=True, renorm_eps=1e-20, scale=2.5,
    ),
    "all_experts": route_graph(4, k=4),
}  # fmt: skip


def _kernel(backend: Backend, graph: Graph) -> Kernel:
    support = backend.supports(program_op(graph), TARGET)
    if not support.ok:
        pytest.skip(f"{backend.name}: {support.reason}")
    skip_unless_it_works(backend)
    return backend.load(backend.lower(graph, TARGET))


@pytest.fixture(params=sorted(all_backends()))
def backend(request: pytest.FixtureRequest) -> Backend:
    return all_backends()[request.param]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_experts_agree_with_the_reference(backend: Backend, case: ExpertsCase) -> None:
    graph = case.graph()
    kernel = _kernel(backend, graph)
    for tokens in TOKENS:
        for skew in SKEWS:
            inputs = case.inputs(tokens, skew)
            before = [t.clone() for t in inputs]
            with torch.no_grad():
                (want,) = run_graph(graph, inputs)
                (got,) = kernel.forward(inputs)
            assert got.dtype == want.dtype
            assert relative_error(got, want) <= TOLERANCE[case.dtype], (tokens, skew)
            assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input was written to"


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_agree_with_the_reference(backend: Backend, name: str) -> None:
    graph = ROUTERS[name]
    kernel = _kernel(backend, graph)
    torch.manual_seed(0)
    for tokens in TOKENS:
        inputs = [
            torch.randn(tokens, v.type.shape[1], dtype=torch.bfloat16 if "bf16" in name else torch.float32)
            if i == 0
            else torch.randn(int(v.type.shape[0])) / 8
            for i, v in enumerate(graph.args)
        ]
        want_w, want_ids = run_graph(graph, inputs)
        got_w, got_ids = kernel.forward(inputs)
        assert torch.equal(got_ids, want_ids)
        assert got_w.dtype == want_w.dtype
        assert relative_error(got_w, want_w) <= TOLERANCE["bf16" if "bf16" in name else "f32"]


def test_the_same_input_gives_the_same_bits(backend: Backend) -> None:
    case = ExpertsCase(dtype="bf16", weight_dtype="f32", hidden=64, inner=32)
    kernel = _kernel(backend, case.graph())
    inputs = case.inputs(33)
    with torch.no_grad():
        first = kernel.forward(inputs)[0]
        assert all(torch.equal(kernel.forward(inputs)[0], first) for _ in range(3))


def test_gradients_agree_with_the_reference(backend: Backend) -> None:
    if not backend.trainable:
        pytest.skip(f"{backend.name} has no gradients")
    case = ExpertsCase(bias=True)
    kernel = _kernel(backend, case.graph())
    oracle = all_backends()["reference"]
    reference = oracle.load(oracle.lower(case.graph(), TARGET))
    for tokens in TOKENS:
        inputs = case.inputs(tokens)
        needs = [t.is_floating_point() for t in inputs]
        grad = torch.randn(tokens, case.hidden)
        got, want = (k.backward([grad], inputs, needs) for k in (kernel, reference))
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert (a is None) == (b is None) == (not needs[i])
            if a is not None and b is not None:
                assert relative_error(a, b) <= TOLERANCE["f32"], (tokens, i)


def test_status_names_the_three_stages(backend: Backend) -> None:
    lines = backend.status()
    assert [line.stage for line in lines] == ["emit", "build", "run"]
    assert all(line.works or line.detail for line in lines), "a stage that does not work says why"


def test_an_op_it_does_not_know_is_refused_with_a_reason(backend: Backend) -> None:
    g = Graph("g")
    x, ids = g.add_arg(TensorType.of("f32", "T", 4)), g.add_arg(TensorType.of("i64", "T", 2))
    op = g.append(Op("moe.dispatch", [x, ids], [x.type, PlanType(4)], attrs={"experts": 4}))
    support = backend.supports(op, TARGET)
    assert not support.ok
    assert support.reason
