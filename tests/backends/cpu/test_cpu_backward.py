"""The cpu backend's gradients against autograd through a plain loop over experts in f64."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from moec.backends.aten.spec import Spec
from moec.backends.cpu import CpuBackend, recycle
from moec.backends.cpu.backward import CpuBackward
from moec.backends.cpu.isa import EMULATED_AMX, LEVELS, missing
from moec.backends.cpu.source import read_shape
from moec.ir.core import Graph
from moec.ir.types import TensorType
from tests.backends.cases import TOLERANCE, ExpertsCase, call, case_id, close, relative_error
from tests.backends.cpu.kernels import HERE, needs_kernels

pytestmark = needs_kernels
ODD = ExpertsCase(hidden=37, inner=19, bias=True)
PAIRS = ExpertsCase(
    hidden=45, inner=70, dtype="bf16", weight_dtype="f32", layout="interleaved", up_form="kn", down_form="kn", bias=True
)
LISTS = ExpertsCase(
    hidden=21, inner=35, dtype="f16", layout="separate", up_form="kn", stacked=False, bias=True, sentinels=True
)
WIDE = ExpertsCase(
    hidden=300, inner=150, dtype="bf16", weight_dtype="f32", layout="single", captures=True, top_k=2, sentinels=True
)
Gradients = list[Tensor | None]


@lru_cache
def kernel(case: ExpertsCase, level: str) -> CpuBackward:
    op = case.graph().ops[0]
    return CpuBackward(op, read_shape(op), Spec.of(op), {**LEVELS, EMULATED_AMX.name: EMULATED_AMX}[level])


def wanted(case: ExpertsCase, inputs: list[Tensor]) -> list[bool]:
    """All but ids and captured tensors."""
    last = len(inputs) - int(case.captures)
    return [t.is_floating_point() and i < last for i, t in enumerate(inputs)]


def autograd(case: ExpertsCase, inputs: list[Tensor], grad: Tensor) -> Gradients:
    """Gradients of every floating input, by a loop over experts in f64."""
    leaves = [t.double().requires_grad_() if t.is_floating_point() else t for t in (i.detach() for i in inputs)]
    x, ids, weights, *rest = leaves
    groups = {name: [rest.pop(0) for _ in shapes] for name, shapes in case.shapes().items()}
    out = torch.zeros(grad.shape, dtype=torch.float64)
    for e in range(case.experts):
        token, choice = (ids == e).nonzero(as_tuple=True)

        def of(name: str, part: int = 0, e: int = e) -> Tensor:
            return groups[name][part][e] if case.stacked else groups[name][part * case.experts + e]

        rows = []
        for part in range(case.parts):
            w = of("up", part)
            h = x[token] @ (w.T if case.up_form == "nk" else w)
            rows.append(h + of("up_bias", part) if case.bias else h)
        if case.layout == "concat":
            rows = list(rows[0].chunk(2, dim=1))
        elif case.layout == "interleaved":
            rows = [rows[0][:, ::2], rows[0][:, 1::2]]
        a = rows[0].clamp(min=0) ** 2 if len(rows) == 1 else rows[0] * rows[0].sigmoid() * rows[1]
        if case.captures:
            a = a * groups["captures"][0]
        o = a @ (of("down").T if case.down_form == "nk" else of("down"))
        if case.bias:
            o = o + of("down_bias")
        out = out.index_add(0, token, o * weights[token, choice, None])
    floats = [t for t in leaves if t.requires_grad]
    found = iter(torch.autograd.grad(out, floats, grad.double(), allow_unused=True, materialize_grads=True))
    return [next(found) if t.requires_grad else None for t in leaves]


def compare(case: ExpertsCase, got: Gradients | None, want: Gradients, needs: list[bool], inputs: list[Tensor]) -> None:
    assert got is not None
    for i, (g, w, need) in enumerate(zip(got, want, needs, strict=True)):
        assert (g is not None) == need
        if g is not None and w is not None:
            assert g.dtype == inputs[i].dtype
            assert relative_error(g, w) <= TOLERANCE[case.dtype], i


def gradient(case: ExpertsCase, tokens: int) -> Tensor:
    return torch.randn(tokens, case.hidden).to(TO[case.dtype])


TO = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BUILDS = [(ODD, 0), (ODD, -1), (PAIRS, 0), (PAIRS, -1), (LISTS, -1), (WIDE, -1)]


@pytest.mark.parametrize(("case", "level"), BUILDS, ids=lambda v: case_id(v) if isinstance(v, ExpertsCase) else str(v))
def test_gradients_are_those_of_the_loop(case: ExpertsCase, level: int) -> None:
    for tokens, skew in ((0, "uniform"), (1, "uniform"), (33, "half_empty"), (33, "one_expert"), (257, "uniform")):
        inputs = case.inputs(tokens, skew)
        grad, needs = gradient(case, tokens), wanted(case, inputs)
        got = kernel(case, HERE[level])(grad, inputs, needs, 2)
        compare(case, got, autograd(case, inputs, grad), needs, inputs)


LARGE = [
    ExpertsCase(hidden=1024, inner=1408, experts=8, top_k=2, dtype="bf16", weight_dtype="f32"),
    ExpertsCase(hidden=1024, inner=1408, experts=8, top_k=2, up_form="kn", down_form="kn"),
]


@pytest.mark.parametrize(("case", "level"), [(LARGE[0], -1), (LARGE[1], 0)])
def test_gradients_that_no_cache_holds(case: ExpertsCase, level: int) -> None:
    inputs = case.inputs(21, "half_empty")
    grad, needs = gradient(case, 21), wanted(case, inputs)
    got = kernel(case, HERE[level])(grad, inputs, needs, 2)
    compare(case, got, autograd(case, inputs, grad), needs, inputs)


@pytest.mark.skipif(bool(missing(EMULATED_AMX)), reason="no AVX-512 BF16 in this processor")
@pytest.mark.parametrize("case", [PAIRS, WIDE], ids=case_id)
def test_gradients_by_tiles_of_amx(case: ExpertsCase) -> None:
    for tokens, skew in ((1, "uniform"), (33, "one_expert"), (257, "uniform")):
        inputs = case.inputs(tokens, skew)
        grad, needs = gradient(case, tokens), wanted(case, inputs)
        got = kernel(case, EMULATED_AMX.name)(grad, inputs, needs, 2)
        compare(case, got, autograd(case, inputs, grad), needs, inputs)
        if HERE[-1] == "amx":  # the same, bit for bit
            real = kernel(case, "amx")(grad, inputs, needs, 2)
            assert got is not None and real is not None
            assert all(a is b or torch.equal(a, b) for a, b in zip(got, real, strict=True))


@pytest.mark.parametrize("case", [ODD, WIDE], ids=case_id)
def test_one_expert_may_take_more_rows_than_a_task(case: ExpertsCase) -> None:
    inputs = case.inputs(700, "one_expert")
    grad, needs = gradient(case, 700), wanted(case, inputs)
    compare(case, kernel(case, HERE[-1])(grad, inputs, needs, 2), autograd(case, inputs, grad), needs, inputs)


def test_rows_of_several_groups_of_experts() -> None:
    inputs = WIDE.inputs(7000)
    grad, needs = gradient(WIDE, 7000), wanted(WIDE, inputs)
    got = kernel(WIDE, HERE[-1])(grad, inputs, needs, 1)
    compare(WIDE, got, autograd(WIDE, inputs, grad), needs, inputs)
    again = kernel(WIDE, HERE[-1])(grad, inputs, needs, 2)
    assert got is not None and again is not None
    assert all(g is None or torch.equal(g, a) for g, a in zip(got, again, strict=True) if a is not None)


@pytest.mark.parametrize(("case", "level"), [(ODD, 0), (PAIRS, -1), (LISTS, -1)], ids=["f32", "bf16", "f16"])
def test_the_same_bits_whatever_the_threads(case: ExpertsCase, level: int) -> None:
    inputs = case.inputs(301)
    grad, needs = gradient(case, 301), wanted(case, inputs)
    one, *others = (kernel(case, HERE[level])(grad, inputs, needs, threads) for threads in (1, 2, 3, 2))
    assert one is not None
    for other in others:
        assert other is not None
        assert all((g is None and o is None) or torch.equal(g, o) for g, o in zip(one, other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [ODD, LISTS], ids=["stacked", "lists"])
def test_what_is_not_needed_is_not_there_and_changes_nothing(case: ExpertsCase) -> None:
    inputs = case.inputs(33)
    grad, all_needs = gradient(case, 33), wanted(case, inputs)
    run = kernel(case, HERE[-1])
    whole = run(grad, inputs, all_needs, 2)
    assert whole is not None
    floats = [i for i, need in enumerate(all_needs) if need]
    subsets = [
        {0},
        {2},
        {0, 2},
        set(floats) - {0},
        set(floats[2:]),
        set(floats[1::2]),
        set(),
        *({i} for i in floats[2:]),
    ]
    for subset in subsets:
        got = run(grad, inputs, [i in subset for i in range(len(inputs))], 2)
        assert got is not None
        for i, (g, w) in enumerate(zip(got, whole, strict=True)):
            assert (g is not None) == (i in subset)
            assert g is None or (w is not None and torch.equal(g, w)), (subset, i)


def test_every_expert_chosen_by_every_token() -> None:
    case = ExpertsCase(hidden=37, inner=19, bias=True, top_k=5)
    inputs = case.inputs(19)
    grad, needs = gradient(case, 19), wanted(case, inputs)
    compare(case, kernel(ODD, HERE[-1])(grad, inputs, needs, 2), autograd(case, inputs, grad), needs, inputs)


@pytest.mark.parametrize("case", [PAIRS, LISTS], ids=["stacked", "lists"])
def test_weights_and_gradients_lie_as_they_lie(case: ExpertsCase) -> None:
    def transposed(t: Tensor) -> Tensor:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() >= 2 else t

    def padded(t: Tensor) -> Tensor:
        return torch.cat([t, t], dim=-1)[..., : t.shape[-1]]

    inputs = case.inputs(33)
    grad, needs = gradient(case, 33), wanted(case, inputs)
    want = autograd(case, inputs, grad)
    matrices = len(case.shapes()["up"]) + len(case.shapes()["down"])
    for change in (transposed, padded):
        moved = inputs[:3] + [change(t) for t in inputs[3 : 3 + matrices]] + inputs[3 + matrices :]
        wide = torch.cat([grad, grad], dim=1)[:, : case.hidden]
        got = kernel(case, HERE[-1])(wide, [padded(moved[0]), moved[1].to(torch.int32), *moved[2:]], needs, 2)
        compare(case, got, want, needs, moved)
        assert got is not None
        for g, t in zip(got[3:], moved[3:], strict=True):
            assert g is not None and g.stride() == torch.empty_like(t).stride()
    spread = [torch.stack([t, t], dim=-1)[..., 0] for t in inputs[3 : 3 + matrices]]
    assert kernel(case, HERE[-1])(grad, inputs[:3] + spread + inputs[3 + matrices :], needs, 2) is None


def test_what_it_does_not_have_comes_from_aten() -> None:
    case = ExpertsCase(captures=True)
    graph = case.graph()
    region = Graph("activation")
    row = TensorType.of("f32", "R", case.inner)
    g, u = (region.add_arg(row) for _ in range(2))
    scale = region.add_arg(TensorType.of("f32", case.inner))
    bound = call(region, "clamp_min.Tensor", g, call(region, "neg.default", u))
    close(region, call(region, "mul.Tensor", bound, scale))
    graph.ops[0].regions[0] = region
    backend = CpuBackend()
    loaded = backend.load(backend.lower(graph, f"cpu:{HERE[-1]}"))
    inputs, op = case.inputs(9), graph.ops[0]
    made = CpuBackward(op, read_shape(op), Spec.of(op), LEVELS[HERE[-1]])
    assert "clamp_min.Tensor with bounds that depend on its rows" in made.reason
    grad, needs = gradient(case, 9), [t.is_floating_point() for t in inputs]
    assert made(grad, inputs, needs, 1) is None
    assert all((g is not None) == need for g, need in zip(loaded.backward([grad], inputs, needs), needs, strict=True))
    captured = kernel(WIDE, HERE[-1])
    few = WIDE.inputs(3)
    assert captured(gradient(WIDE, 3), few, [False] * (len(few) - 1) + [True], 1) is None


def test_the_backend_gives_these_gradients() -> None:
    backend, graph = CpuBackend(), ODD.graph()
    loaded = backend.load(backend.lower(graph, f"cpu:{HERE[-1]}"))
    inputs = ODD.inputs(33)
    grad, needs = gradient(ODD, 33), wanted(ODD, inputs)
    got, direct = loaded.backward([grad], inputs, needs), kernel(ODD, HERE[-1])(grad, inputs, needs, 1)
    assert direct is not None
    assert all((g is None and d is None) or torch.equal(g, d) for g, d in zip(got, direct, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [ODD, PAIRS], ids=case_id)
def test_what_the_last_step_left_in_memory_is_not_seen(case: ExpertsCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycle, "FROM_BYTES", 0)
    for _ in range(2):
        inputs = case.inputs(33, "half_empty")
        grad, needs = gradient(case, 33), wanted(case, inputs)
        got = kernel(case, HERE[-1])(grad, inputs, needs, 2)
        compare(case, got, autograd(case, inputs, grad), needs, inputs)
        for g in got or ():
            if g is not None:
                g.fill_(float("nan"))
        del got
        assert recycle.SHARED.idle_bytes() > 0
