"""Slots of no expert: every backend leaves them out of the result and of all gradients, whatever stands in them."""

from __future__ import annotations

import pytest
import torch

from moec.backends.base import Backend, Kernel, program_op
from moec.backends.registry import all_backends
from tests.backends.cases import TOLERANCE, ExpertsCase, relative_error
from tests.support.backends import skip_unless_it_works

CASE = ExpertsCase(sentinels=True, bias=True)
MARKS = (-1, CASE.experts, CASE.experts + 7)


@pytest.fixture(params=sorted(all_backends()))
def backend(request: pytest.FixtureRequest) -> Backend:
    found = all_backends()[request.param]
    skip_unless_it_works(found)
    if not (support := found.supports(program_op(CASE.graph()), "cpu")).ok:
        pytest.skip(f"{found.name}: {support.reason}")
    return found


def kernel_of(backend: Backend) -> Kernel:
    return backend.load(backend.lower(CASE.graph(), "cpu"))


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_nothing_but_slots_of_no_expert(backend: Backend, tokens: int) -> None:
    kernel, inputs = kernel_of(backend), CASE.inputs(tokens)
    inputs[1] = torch.tensor([MARKS] * tokens)
    inputs[2][:] = torch.nan
    inputs[0][0] = torch.inf
    with torch.no_grad():
        (got,) = kernel.forward(inputs)
    assert got.equal(torch.zeros(tokens, CASE.hidden))
    if backend.trainable:
        needs = [t.is_floating_point() for t in inputs]
        for g in kernel.backward([torch.ones(tokens, CASE.hidden)], inputs, needs):
            assert g is None or not g.any()


def test_what_stands_in_dead_slots_does_not_count(backend: Backend) -> None:
    """Weights NaN there, a token without experts infinite, an expert without tokens NaN."""
    kernel, inputs = kernel_of(backend), CASE.inputs(33)
    ids = inputs[1]
    ids[:] = torch.where((ids < 0) | (ids >= CASE.experts), CASE.experts, ids)
    ids[ids == 2] = -1
    ids[5] = torch.tensor(MARKS)
    dead = (ids < 0) | (ids >= CASE.experts)
    assert dead.sum() > 33 and (~dead).any()
    clean = [t.clone() for t in inputs]
    inputs[2][dead] = torch.nan
    inputs[0][5] = torch.inf
    for parameter in inputs[3:]:
        parameter[2] = torch.nan
    with torch.no_grad():
        (want,), (got,) = kernel.forward(clean), kernel.forward(inputs)
    assert relative_error(got, want) <= TOLERANCE["f32"]
    assert not got[5].any()
    if not backend.trainable:
        return
    needs, grad = [t.is_floating_point() for t in inputs], torch.randn(33, CASE.hidden)
    found, expected = (kernel.backward([grad], i, needs) for i in (inputs, clean))
    for a, b in zip(found, expected, strict=True):
        if a is not None and b is not None:
            assert relative_error(a, b) <= TOLERANCE["f32"]
    d_x, _, d_w, *d_params = found
    assert d_x is not None and d_w is not None
    assert not d_x[5].any() and not d_w[dead].any() and d_w[~dead].all()
    assert all(p is not None and not p[2].any() for p in d_params)
