"""Gradients of layers, their GEMMs in Triton's interpreter, against autograd through the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moec.backends.base import program_op
from moec.backends.reference import AutogradKernel, run_graph
from moec.backends.triton import backward
from moec.backends.triton.kernel import TritonExperts
from moec.backends.triton.spec import read_spec
from tests.backends.cases import SKEWS, ExpertsCase, case_id, relative_error
from tests.backends.triton.layers import dirty_memory

pytestmark = pytest.mark.usefixtures("interpreter")
TOLERANCE = {"f32": 1e-5, "f16": 4e-3, "bf16": 3e-2}
"""Sums are taken in another order; narrow gradients are rounded at other places than autograd rounds."""
SIZES = {"hidden": 20, "inner": 24}
CASES = [
    ExpertsCase(bias=True, weight_dtype="f32", **SIZES),
    ExpertsCase("interleaved", "kn", "kn", bias=True, captures=True, sentinels=True, **SIZES),
    ExpertsCase("separate", "kn", "nk", stacked=False, bias=True, **SIZES),
    ExpertsCase("single", "nk", "kn", dtype="bf16", weight_dtype="f32", **SIZES),
    ExpertsCase("rows", post=True, bias=True, sentinels=True, **SIZES),
    ExpertsCase("concat", "kn", "nk", dtype="f16", top_k=5, **SIZES),
    ExpertsCase("separate", stacked=False, bias=True, experts=1, top_k=1, **SIZES),
]


def _kernel(case: ExpertsCase) -> TritonExperts:
    op = program_op(case.graph())
    return TritonExperts(op, read_spec(op), "cuda:sm90")


def _needs(inputs: list[Tensor]) -> list[bool]:
    return [t.is_floating_point() for t in inputs]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradients(case: ExpertsCase) -> None:
    graph = case.graph()
    reference = AutogradKernel(lambda inputs: run_graph(graph, inputs))
    for tokens, skew in zip((0, 1, 19), SKEWS, strict=True):
        inputs = case.inputs(tokens, skew)
        grad = torch.randn(tokens, case.hidden).to(inputs[0].dtype)
        want = reference.backward([grad], inputs, _needs(inputs))
        with dirty_memory(), torch.no_grad():
            got = _kernel(case).backward([grad], inputs, _needs(inputs))
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert (g is None) == (w is None), i
            if g is not None and w is not None:
                assert g.dtype == w.dtype
                assert relative_error(g, w) <= TOLERANCE[case.dtype], (tokens, i)


def test_only_what_is_needed() -> None:
    case = CASES[1]
    inputs = case.inputs(5)
    grad = torch.randn(5, case.hidden)
    every = _kernel(case).backward([grad], inputs, _needs(inputs))
    for wanted in (0, 2, 3, 4, 5, 6, 7):
        needs = [i == wanted for i in range(len(inputs))]
        with torch.no_grad():
            got = _kernel(case).backward([grad], inputs, needs)
        assert [g is not None for g in got] == needs
        assert torch.equal(got[wanted], every[wanted])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("row[:, None] * inputs", "row[:, None] * (inputs - 1)"),
        ("column[None, :] * w_sn", "column[None, :] * (w_sn + 1)"),
        ("row < last", "row <= last"),
        (">= 0\n        at", ">= -1\n        at"),
        ("n[:, None] * o_sn", "n[:, None] * (o_sn - 1)"),
    ],
)
def test_a_wrong_stride_or_mask_shows(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = backward.write_gradients

    def changed(dtype: str, stacked: bool, interpreted: bool, aligned: bool) -> object:
        file = written(dtype, stacked, interpreted, aligned)
        assert old in file.text
        return type(file)(file.text.replace(old, new), file.kernels)

    case = CASES[0]
    inputs = case.inputs(19)
    grad = torch.randn(19, case.hidden)
    want = AutogradKernel(lambda i: run_graph(case.graph(), i)).backward([grad], inputs, _needs(inputs))
    monkeypatch.setattr(backward, "write_gradients", changed)
    backward._launcher.cache_clear()
    with dirty_memory(), torch.no_grad():
        got = _kernel(case).backward([grad], inputs, _needs(inputs))
    backward._launcher.cache_clear()
    errors = [relative_error(g, w) for g, w in zip(got, want, strict=True) if g is not None and w is not None]
    assert not all(e <= TOLERANCE["f32"] for e in errors)


def test_gradients_of_some_experts_are_written_into_those_of_all() -> None:
    case, only = CASES[0], [4, 1]
    inputs = case.inputs(19)
    inputs[1] = torch.where(inputs[1] == 1, 1, 4).to(inputs[1].dtype)
    grad, needs = torch.randn(19, case.hidden), _needs(inputs)
    into = [torch.full_like(t, torch.nan) if i > 2 else None for i, t in enumerate(inputs)]
    with dirty_memory(), torch.no_grad():
        want = _kernel(case).backward([grad], inputs, needs)
        got = _kernel(case).backward_into([grad], inputs, needs, into, only)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g is not None and w is not None if needs[i] else g is None
        if g is not None and w is not None and i > 2:
            assert g is into[i] and torch.equal(g[only], w[only]) and g[[0, 2, 3]].isnan().all()
        elif g is not None and w is not None:
            assert torch.equal(g, w)
