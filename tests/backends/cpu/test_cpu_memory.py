"""Kernels read memory through pointers: what is no memory of the CPU's is an error that says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moec.backends.base import program_op
from moec.backends.cpu.memory import OperandError
from moec.ir.types import TensorType
from tests.backends.cases import ExpertsCase
from tests.backends.cpu.kernels import BACKEND, load, needs_kernels

CASE = ExpertsCase()
FIRST_WEIGHT, LAST_WEIGHT = 3, 4


def freed(t: Tensor) -> Tensor:
    """A tensor of the same shape whose storage was given back, as sharding does between the calls of a layer."""
    other = t.clone()
    other.untyped_storage().resize_(0)
    return other


def negated(t: Tensor) -> Tensor:
    """The same values; its memory holds them with the other sign."""
    other = torch.imag(torch.complex(torch.zeros_like(t), -t).conj())
    assert other.is_neg() and torch.equal(other, t)
    return other


@needs_kernels
@pytest.mark.parametrize("which", [FIRST_WEIGHT, LAST_WEIGHT])
@pytest.mark.parametrize(("spoil", "message"), [(freed, "storage was freed"), (negated, "lazily negated")])
def test_weights_that_cannot_be_read(which: int, spoil: Callable[[Tensor], Tensor], message: str) -> None:
    kernel = load(CASE.graph())
    inputs = CASE.inputs(7)
    want = kernel.forward(inputs)[0]
    spoilt = [spoil(t) if i == which else t for i, t in enumerate(inputs)]
    with pytest.raises(OperandError, match=message):
        kernel.forward(spoilt)
    needs = [t.is_floating_point() for t in inputs]
    with pytest.raises(OperandError, match=message):
        kernel.backward([torch.ones_like(want)], spoilt, needs)
    assert torch.equal(kernel.forward(inputs)[0], want)


@needs_kernels
@pytest.mark.parametrize("which", range(LAST_WEIGHT + 1))
def test_operands_of_another_device(which: int) -> None:
    kernel = load(CASE.graph())
    inputs = [t.to("meta") if i == which else t for i, t in enumerate(CASE.inputs(7))]
    with pytest.raises(OperandError, match="was given a tensor on meta"):
        kernel.forward(inputs)


@pytest.mark.parametrize("which", [0, FIRST_WEIGHT])
def test_programs_of_another_device_are_left_to_others(which: int) -> None:
    graph = CASE.graph()
    value = graph.args[which]
    assert isinstance(value.type, TensorType)
    value.type = dataclasses.replace(value.type, device="cuda:0")
    support = BACKEND.supports(program_op(graph), "cpu")
    assert not support.ok
    assert support.reason == "its operands are on cuda:0"
