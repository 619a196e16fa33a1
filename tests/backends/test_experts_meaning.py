"""The reference and aten kernels against a plain loop in f64, and aten's gradients against autograd."""

from __future__ import annotations

import itertools

import pytest
import torch

from moec.backends.aten import AtenBackend
from moec.backends.aten import forward as aten_forward
from moec.backends.aten import slots as aten_slots
from moec.backends.base import Kernel
from moec.backends.reference import ReferenceBackend, run_graph
from moec.ir.core import Graph
from moec.ir.errors import IRError
from moec.ir.types import TensorType
from moec.ir.verifier import verify
from tests.backends.cases import SKEWS, TOLERANCE, ExpertsCase, case_id, loop_experts, relative_error

LAYOUTS = ("concat", "interleaved", "separate", "single", "rows")
ALL = [
    ExpertsCase(layout, up, down, stacked, bias=extra, captures=extra, post=post, sentinels=s, dtype="f64")
    for layout, (up, down), stacked, extra, post, s in itertools.product(
        LAYOUTS, (("nk", "nk"), ("kn", "nk"), ("kn", "kn")), (True, False), (False, True), (False, True), (False, True)
    )
]
WIDTHS = (8, 3, 17, 1, 12)
RAGGED = [
    ExpertsCase(layout, *form, stacked=False, bias=extra, post=extra, sentinels=extra, dtype="f64", widths=WIDTHS)
    for layout, form, extra in (
        ("concat", ("nk", "nk"), True),
        ("interleaved", ("kn", "nk"), False),
        ("separate", ("nk", "kn"), True),
        ("single", ("kn", "kn"), True),
        ("rows", ("nk", "nk"), False),
    )
]
SOME = RAGGED + ALL[::7]  # 7 shares no factor with the number of values of any field


def aten(graph: Graph) -> Kernel:
    return AtenBackend().load(AtenBackend().lower(graph, "cpu"))


def reference(graph: Graph) -> Kernel:
    return ReferenceBackend().load(ReferenceBackend().lower(graph, "cpu"))


@pytest.mark.parametrize("case", ALL + RAGGED, ids=case_id)
def test_forward_is_the_loop(case: ExpertsCase) -> None:
    graph = case.graph()
    kernel = aten(graph)
    for tokens, skew in ((0, "uniform"), (1, "uniform"), (9, "half_empty"), (12, "one_expert")):
        inputs = case.inputs(tokens, skew)
        want = loop_experts(case, inputs)
        assert relative_error(run_graph(graph, inputs)[0], want) <= TOLERANCE["f64"]
        assert relative_error(kernel.forward(inputs)[0], want) <= TOLERANCE["f64"]


@pytest.mark.parametrize("case", SOME, ids=case_id)
def test_gradients_are_autograds(case: ExpertsCase) -> None:
    graph = case.graph()
    mine, oracle = aten(graph), reference(graph)
    for tokens, skew in ((0, "uniform"), (1, "uniform"), (9, "half_empty")):
        inputs = case.inputs(tokens, skew)
        needs = [t.is_floating_point() for t in inputs]
        grad = torch.randn(tokens, case.hidden, dtype=torch.float64)
        got, want = mine.backward([grad], inputs, needs), oracle.backward([grad], inputs, needs)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            if needs[i]:
                assert a is not None
                assert b is not None
                assert relative_error(a, b) <= TOLERANCE["f64"], (tokens, i)


@pytest.mark.parametrize("case", SOME[::4], ids=case_id)
def test_only_the_wanted_gradients_are_made(case: ExpertsCase) -> None:
    graph = case.graph()
    inputs = case.inputs(9)
    grad = torch.randn(9, case.hidden, dtype=torch.float64)
    everything = [t.is_floating_point() for t in inputs]
    want = reference(graph).backward([grad], inputs, everything)
    kernel = aten(graph)
    for wanted in [i for i, f in enumerate(everything) if f]:
        needs = [i == wanted for i in range(len(inputs))]
        got = kernel.backward([grad], inputs, needs)
        assert [g is not None for g in got] == needs
        assert relative_error(got[wanted], want[wanted]) <= TOLERANCE["f64"], wanted


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("weight_dtype", ["f32", ""])
def test_gradients_in_narrow_types(dtype: str, weight_dtype: str) -> None:
    case = ExpertsCase(dtype=dtype, weight_dtype=weight_dtype, bias=True, captures=True)
    exact = ExpertsCase(dtype="f64", bias=True, captures=True)
    inputs = case.inputs(17)
    needs = [t.is_floating_point() for t in inputs]
    grad = torch.randn(17, case.hidden).to(inputs[0].dtype)
    got = aten(case.graph()).backward([grad], inputs, needs)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    want = reference(exact.graph()).backward([grad.double()], wide, needs)
    for a, b, t in zip(got, want, inputs, strict=True):
        if a is not None and b is not None:
            assert a.dtype == t.dtype
            assert relative_error(a, b) <= TOLERANCE[dtype]


@pytest.mark.parametrize("skew", SKEWS)
def test_narrow_results_are_bitwise_the_reference(skew: str) -> None:
    """The same products and sums in the same order: no rounding of its own."""
    for weight_dtype in ("f32", "bf16"):
        case = ExpertsCase(dtype="bf16", weight_dtype=weight_dtype, bias=True, hidden=32, inner=32)
        for tokens in (1, 2, 33):
            inputs = case.inputs(tokens, skew)
            assert torch.equal(aten(case.graph()).forward(inputs)[0], run_graph(case.graph(), inputs)[0])


def test_groups_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ExpertsCase(bias=True, post=True, sentinels=True, dtype="f64")
    graph, inputs = case.graph(), case.inputs(33)
    needs = [t.is_floating_point() for t in inputs[:-1]] + [False]
    grad = torch.randn(33, case.hidden, dtype=torch.float64)
    whole = aten(graph)
    want, want_grads = whole.forward(inputs)[0], whole.backward([grad], inputs, needs)
    monkeypatch.setattr(aten_slots, "GROUP_BYTES", 1)
    monkeypatch.setattr(aten_forward, "COMBINE_BYTES", 1)
    assert relative_error(whole.forward(inputs)[0], want) <= TOLERANCE["f64"]
    for a, b in zip(whole.backward([grad], inputs, needs), want_grads, strict=True):
        if b is not None:
            assert relative_error(a, b) <= TOLERANCE["f64"]


def test_the_working_set_is_the_rows_and_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither weights nor the gathered tokens nor the up GEMM's rows are ever held whole."""
    case = ExpertsCase(experts=16, top_k=4, hidden=64, inner=64)
    kernel, inputs = aten(case.graph()), case.inputs(512)
    block = 64 << 10
    monkeypatch.setattr(aten_slots, "GROUP_BYTES", block)
    monkeypatch.setattr(aten_forward, "COMBINE_BYTES", block)
    row_bytes = (2 * case.hidden + 2 * case.up_width(case.inner)) * 4
    largest = int(inputs[1].flatten().bincount().max()) * row_bytes
    rows, result, indices = 512 * 4 * case.hidden * 4, 512 * case.hidden * 4, 6 * 512 * 4 * 8
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        kernel.forward(inputs)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    held = list(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))
    assert rows < max(held) < rows + result + indices + max(largest, block) + 2 * block


def test_gradients_of_untouched_experts_are_zero() -> None:
    case = ExpertsCase()
    inputs = case.inputs(9, "half_empty")
    grads = aten(case.graph()).backward([torch.ones(9, case.hidden)], inputs, [True, False, True, True, True])
    untouched = sorted(set(range(case.experts)) - set(inputs[1].flatten().tolist()))
    assert untouched
    for g in grads[3:]:
        assert g is not None
        assert not g[untouched].any()
        assert g.any()


def test_one_token_that_names_an_expert_twice_gets_it_twice() -> None:
    case = ExpertsCase(top_k=2, dtype="f64")
    inputs = case.inputs(1)
    inputs[1] = torch.tensor([[3, 3]])
    assert relative_error(aten(case.graph()).forward(inputs)[0], loop_experts(case, inputs)) <= TOLERANCE["f64"]


def test_non_finite_rows_of_sentinels_do_not_leak() -> None:
    case = ExpertsCase(sentinels=True, dtype="f64")
    inputs = case.inputs(6)
    inputs[1][:] = case.experts
    inputs[1][0] = torch.tensor([0, 1, 2])
    inputs[2][1:] = float("nan")
    assert torch.isfinite(aten(case.graph()).forward(inputs)[0]).all()


def test_weights_that_are_strided_views() -> None:
    """A transposed, sliced or expanded weight is read where it lies."""
    case = ExpertsCase(dtype="f64")
    inputs = case.inputs(9)
    want = loop_experts(case, inputs)
    up, down = inputs[3], inputs[4]
    wide = torch.randn(*up.shape[:2], 2 * up.shape[2], dtype=torch.float64)
    wide[:, :, ::2] = up
    strided = [*inputs[:3], wide[:, :, ::2], down.transpose(1, 2).contiguous().transpose(1, 2)]
    kernel = aten(case.graph())
    assert relative_error(kernel.forward(strided)[0], want) <= TOLERANCE["f64"]
    grad = torch.randn(9, case.hidden, dtype=torch.float64)
    needs = [True, False, True, True, True]
    for a, b in zip(kernel.backward([grad], strided, needs), kernel.backward([grad], inputs, needs), strict=True):
        if b is not None:
            assert relative_error(a, b) <= TOLERANCE["f64"]


def test_a_gradient_that_is_expanded() -> None:
    case = ExpertsCase(dtype="f64")
    inputs, needs = case.inputs(9), [True, False, True, True, True]
    grad = torch.tensor(1.0, dtype=torch.float64).expand(9, case.hidden)
    kernel = aten(case.graph())
    plain = kernel.backward([grad.contiguous()], inputs, needs)
    for a, b in zip(kernel.backward([grad], inputs, needs), plain, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize(
    ("group", "index", "shape", "message"),
    [
        ("up", 2, (34, 13), "up weight of expert 2 reduces over 13"),
        ("up", 2, (30, 12), "expert 2 has 30 outputs of the up GEMM where 34 are due"),
        ("down", 1, (11, 3), "down weight of expert 1 has 11 outputs"),
        ("down", 1, (2, 12, 3), "down weight 1 must be a tensor of rank 2"),
        ("up_bias", 4, (23,), "up_bias 4 does not fit the 24 outputs"),
    ],
)
def test_sizes_of_one_expert_that_do_not_fit(group: str, index: int, shape: tuple[int, ...], message: str) -> None:
    graph = ExpertsCase(stacked=False, bias=group == "up_bias", widths=WIDTHS).graph()
    verify(graph)
    graph.ops[0].group(group)[index].type = TensorType.of("f32", *shape)
    with pytest.raises(IRError, match=message):
        verify(graph)
