"""Gradients of some experts, written into those of all: the bits of the whole backward, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from moec.backends.base import Backend, program_op
from moec.backends.registry import all_backends
from tests.backends.cases import ExpertsCase
from tests.support.backends import skip_unless_it_works

CASES = {
    "concat": ExpertsCase(bias=True),
    "interleaved": ExpertsCase("interleaved", "kn", "kn", bias=True),
    "separate": ExpertsCase("separate", "kn", "nk", bias=True),
    "rows": ExpertsCase("rows", bias=True, post=True),
}
"""The last one's gradients are aten's on every backend."""
WEIGHTS = slice(3, None)
ONLY = [3, 0]


@pytest.fixture(params=sorted(all_backends()))
def backend(request: pytest.FixtureRequest) -> Backend:
    found = all_backends()[request.param]
    skip_unless_it_works(found)
    if not found.trainable:
        pytest.skip(f"{found.name} has no gradients")
    return found


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("case", CASES)
def test_they_are_written_alone(backend: Backend, case: str, tokens: int) -> None:
    made = CASES[case]
    if not (support := backend.supports(program_op(made.graph()), "cpu")).ok:
        pytest.skip(f"{backend.name}: {support.reason}")
    kernel, inputs = backend.load(backend.lower(made.graph(), "cpu")), made.inputs(tokens)
    inputs[1] = torch.tensor([[0, 0, 0]] * tokens).view(tokens, 3)  # expert 3 is among those wanted, without rows
    grad = torch.randn(tokens, made.hidden)
    needs = [t.is_floating_point() and t.dim() != 1 for t in inputs]
    want = kernel.backward([grad], inputs, needs)
    into = [
        torch.full_like(t, torch.nan) if need and i > 2 else None
        for i, (t, need) in enumerate(zip(inputs, needs, strict=True))
    ]
    got = kernel.backward_into([grad], inputs, needs, into, ONLY)
    assert all(g is place for g, place in zip(got[WEIGHTS], into[WEIGHTS], strict=True))
    for g, w in zip(got[:3], want[:3], strict=True):
        assert (g is None and w is None) or (g is not None and w is not None and torch.equal(g, w))
    for g, w in zip(got[WEIGHTS], want[WEIGHTS], strict=True):
        if g is not None and w is not None:
            assert torch.equal(g[ONLY], w[ONLY])
            assert g[[1, 2, 4]].isnan().all(), "another chunk's"


@pytest.mark.parametrize("tokens", [0, 17])
def test_places_for_all(backend: Backend, tokens: int) -> None:
    made = CASES["concat"]
    if not (support := backend.supports(program_op(made.graph()), "cpu")).ok:
        pytest.skip(f"{backend.name}: {support.reason}")
    kernel, inputs = backend.load(backend.lower(made.graph(), "cpu")), made.inputs(tokens)
    grad, needs = torch.randn(tokens, made.hidden), [t.is_floating_point() for t in inputs]
    into = [torch.full_like(t, torch.nan) if need else None for t, need in zip(inputs, needs, strict=True)]
    got, want = kernel.backward_into([grad], inputs, needs, into), kernel.backward([grad], inputs, needs)
    for g, w, place in zip(got, want, into, strict=True):
        assert g is place and (g is None or (w is not None and torch.equal(g, w)))
