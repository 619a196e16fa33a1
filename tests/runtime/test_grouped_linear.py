"""``moec::grouped_linear`` against a loop in f64: values, gradients, fakes, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moec.ir.errors import MoecError
from moec.runtime.grouped_linear import grouped_linear

K, N, E = 6, 5, 4
OFFSETS = {"even": [2, 4, 6, 8], "empty ones": [0, 5, 5, 7], "one takes all": [0, 0, 9, 9], "none": [0, 0, 0, 0]}
TAIL = 2
"""Rows of no expert after the last one."""


def operands(ends: Sequence[int], *, stacked: bool, inputs_first: bool, biased: bool) -> tuple[list[Tensor], ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    matrix = (K, N) if inputs_first else (N, K)
    weights = [draw(E, *matrix)] if stacked else [draw(*matrix) for _ in range(E)]
    bias = ([draw(E, N)] if stacked else [draw(N) for _ in range(E)]) if biased else []
    return [draw(ends[-1] + TAIL, K)], weights, bias, [torch.tensor(ends, dtype=torch.int32)]


def loop(rows: Tensor, weights: list[Tensor], bias: list[Tensor], ends: Sequence[int], inputs_first: bool) -> Tensor:
    matrices = weights[0].unbind() if weights[0].dim() == 3 else weights
    vectors = bias[0].unbind() if bias and bias[0].dim() == 2 else bias
    out, start = [], 0
    for e, stop in enumerate(ends):
        for r in range(start, stop):
            y = rows[r] @ matrices[e] if inputs_first else matrices[e] @ rows[r]
            out.append(y + vectors[e] if bias else y)
        start = stop
    return torch.stack([*out, *(rows.new_zeros(N) for _ in range(rows.shape[0] - start))])


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("inputs_first", [False, True], ids=["nk", "kn"])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "listed"])
@pytest.mark.parametrize("ends", OFFSETS.values(), ids=OFFSETS)
def test_values_and_gradients(ends: list[int], stacked: bool, inputs_first: bool, biased: bool) -> None:
    (rows,), weights, bias, (offsets,) = operands(ends, stacked=stacked, inputs_first=inputs_first, biased=biased)
    got = grouped_linear(rows, weights, offsets, bias=bias, inputs_first=inputs_first)
    want = loop(rows, weights, bias, ends, inputs_first)
    torch.testing.assert_close(got, want)
    leaves = [rows, *weights, *bias]
    grad = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view(got.shape)
    found = torch.autograd.grad(got, leaves, grad)
    if not want.requires_grad:  # no expert has a row
        want = want + 0.0 * rows.sum()
    expected = torch.autograd.grad(want, leaves, grad, allow_unused=True, materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "listed"])
def test_the_op_is_what_torch_expects_of_an_op(stacked: bool) -> None:
    (rows,), weights, bias, (offsets,) = operands([2, 2, 5, 6], stacked=stacked, inputs_first=False, biased=True)
    torch.library.opcheck(torch.ops.moec.grouped_linear.default, (rows, weights, bias, offsets, False))


def test_only_the_wanted_gradients() -> None:
    (rows,), weights, _, (offsets,) = operands(OFFSETS["even"], stacked=False, inputs_first=False, biased=False)
    for w in weights[1:]:
        w.requires_grad_(False)
    grouped_linear(rows.detach(), weights, offsets).sum().backward()
    assert weights[0].grad is not None and all(w.grad is None for w in weights[1:])
    assert rows.grad is None


def test_weights_may_lie_any_way() -> None:
    (rows,), weights, _, (offsets,) = operands(OFFSETS["even"], stacked=True, inputs_first=False, biased=False)
    strided = weights[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    grouped_linear(rows, [strided], offsets).sum().backward()
    grouped_linear(rows, weights, offsets).sum().backward()
    torch.testing.assert_close(strided.grad, weights[0].grad)


def test_autocast_casts_all() -> None:
    (rows,), weights, bias, (offsets,) = operands(OFFSETS["even"], stacked=False, inputs_first=False, biased=True)
    rows, weights, bias = rows.float(), [w.float() for w in weights], [b.float() for b in bias]
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_linear(rows, weights, offsets, bias=bias)
    assert out.dtype == torch.bfloat16
    want = grouped_linear(rows.bfloat16(), [w.bfloat16() for w in weights], offsets, bias=[b.bfloat16() for b in bias])
    assert torch.equal(out, want)


def test_one_compile_serves_all_numbers_of_rows() -> None:
    (rows,), weights, _, _ = operands([3, 5, 5, 9], stacked=False, inputs_first=False, biased=False)
    compiled = torch.compile(
        lambda r, o: grouped_linear(r, weights, o), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for ends in ([3, 5, 5, 9], [1, 2, 3, 4]):
        part, o = rows.detach()[: ends[-1]], torch.tensor(ends)
        torch.testing.assert_close(compiled(part, o), grouped_linear(part, weights, o))


def test_second_derivatives_are_refused() -> None:
    (rows,), weights, _, (offsets,) = operands(OFFSETS["even"], stacked=True, inputs_first=False, biased=False)
    (grad,) = torch.autograd.grad(grouped_linear(rows, weights, offsets).square().sum(), rows, create_graph=True)
    with pytest.raises(MoecError, match="gradients of gradients"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"rows": torch.zeros(4, K + 1)}, "does not fit rows"),
        ({"rows": torch.zeros(4, K, dtype=torch.float16)}, "types"),
        ({"weights": [torch.zeros(N, K), torch.zeros(N + 1, K)], "offsets": torch.tensor([2, 4])}, "other weights"),
        ({"weights": []}, "takes rows"),
        ({"offsets": torch.tensor([1, 4])}, "2 offsets for 4 experts"),
        ({"offsets": torch.tensor([1.0, 2.0, 3.0, 4.0])}, "integer offsets"),
        ({"bias": [torch.zeros(N)]}, "biases"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_is_refused(wrong: dict[str, object], why: str) -> None:
    given = {"rows": torch.zeros(4, K), "weights": [torch.zeros(E, N, K)], "offsets": torch.tensor([1, 2, 3, 4])}
    with pytest.raises(MoecError, match=why):
        grouped_linear(**{**given, **wrong})  # type: ignore[arg-type]
