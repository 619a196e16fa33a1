"""Linear layers in fp8 as transformers holds them: what their numbers stand for, gradients, and what is left alone."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moec
from tests.backends.cases import relative_error
from tests.backends.fp8 import fp8_row_value, fp8_weight, fp8_weight_value

pytest.importorskip("transformers")
from transformers.integrations.finegrained_fp8 import FP8Linear

NARROW = {torch.float32: 1e-6, torch.bfloat16: 1.2e-2}
"""Sums in another order; in bf16 both sides of each product are rounded to it, and so is the result."""


def layer(outputs: int = 200, inputs: int = 300, dtype: torch.dtype = torch.float32, **options: Any) -> FP8Linear:
    given = {"block_size": (128, 128), "has_bias": True, **options}
    module = FP8Linear(inputs, outputs, **given)
    torch.manual_seed(0)
    values, scales = fp8_weight(torch.randn(1, outputs, inputs))
    module.weight = nn.Parameter(values[0])  # as transformers has it: asks for gradients, and gives none
    if module.weight_scale_inv.dim():
        kind = module.weight_scale_inv.dtype
        found = scales[0] if kind == torch.float32 else torch.exp2(scales[0].log2().ceil())
        module.weight_scale_inv = nn.Parameter(found.to(kind), requires_grad=False)
    if module.has_bias:
        module.bias = nn.Parameter(torch.randn(outputs).to(dtype))
    return module


def in_f64(module: FP8Linear, x: Tensor, narrow: bool = True) -> Tensor:
    weight = fp8_weight_value(module.weight.detach()[None], module.weight_scale_inv.float()[None])[0]
    rows = np.stack([(fp8_row_value(row) if narrow else row).double().numpy() for row in x])
    made = rows @ weight.double().numpy().T
    return torch.from_numpy(made if module.bias is None else made + module.bias.detach().double().numpy())


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("options", [{}, {"has_bias": False}, {"scale_fmt": "ue8m0"}], ids=str)
def test_it_is_what_the_numbers_stand_for(options: dict[str, Any], dtype: torch.dtype) -> None:
    module = layer(dtype=dtype, **options)
    (site,) = moec.prepare(module).rewritten
    assert (site.kind, site.runs_experts) == ("FP8Linear", False)
    x = torch.randn(7, 300).to(dtype)
    x[3] = 0
    with torch.no_grad():
        got = module(x)
        assert got.dtype == dtype
        assert relative_error(got, in_f64(module, x)) <= NARROW[dtype]
        assert module(x[:0]).shape == (0, 200)
        assert torch.equal(module(x.view(1, 7, 300))[0], got)
        exact = in_f64(module, x, narrow=False)
        assert relative_error(got, exact) > 1.2 * NARROW[dtype], "rows are in fp8 too"


def test_gradients_go_to_rows_alone() -> None:
    module = layer()
    moec.prepare(module)
    x = torch.randn(5, 300, requires_grad=True)
    grad = torch.randn(5, 200)
    module(x).backward(grad)
    want = grad @ fp8_weight_value(module.weight.detach()[None], module.weight_scale_inv[None])[0]
    assert x.grad is not None
    assert relative_error(x.grad, want) <= NARROW[torch.float32]
    assert module.weight.grad is None
    torch.testing.assert_close(module.bias.grad, grad.sum(0))


def test_one_graph_for_any_number_of_rows() -> None:
    module = layer()
    moec.prepare(module)
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (2, 5, 9):
            x = torch.randn(tokens, 300)
            assert relative_error(compiled(x), module(x)) <= NARROW[torch.float32]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: layer(activation_scheme="static"), "activation_scheme='static'"),
        (lambda: layer(block_size=None), "a scale for a block of None, not of 128 x 128"),
        (lambda: layer(block_size=(64, 64)), r"a block of \(64, 64\)"),
    ],
)
def test_other_forms_are_left_alone(made: Any, reason: str) -> None:
    report = moec.prepare(made())
    assert not report.rewritten
    (left,) = report.left_out
    assert left.kind == "FP8Linear"
    assert re.search(reason, left.reason)
    assert not report.found, "it is no module that runs experts"


def test_a_weight_of_another_type_is_left_alone() -> None:
    module = layer()
    module.weight = nn.Parameter(module.weight.view(torch.int8), requires_grad=False)
    (left,) = moec.prepare(module).left_out
    assert "its weight is int8" in left.reason
