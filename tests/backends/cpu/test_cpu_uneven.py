"""Experts that are not alike in the cpu backend: intermediate widths of their own, and strides of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moec.backends.aten import AtenBackend
from tests.backends.cases import SKEWS, TOLERANCE, ExpertsCase, case_id, loop_experts, relative_error
from tests.backends.cpu.kernels import BACKEND, HERE, TOKENS, load, needs_kernels

pytestmark = needs_kernels
WIDTHS = (70, 3, 300, 1, 33)
RAGGED = [
    (ExpertsCase("concat", stacked=False, bias=True, hidden=37, widths=WIDTHS), 0),
    (ExpertsCase("interleaved", "kn", stacked=False, dtype="bf16", weight_dtype="f32", hidden=45, widths=WIDTHS), -1),
    (ExpertsCase("separate", "nk", "kn", stacked=False, sentinels=True, dtype="bf16", widths=WIDTHS), 0),
    (ExpertsCase("single", "kn", "kn", stacked=False, bias=True, post=True, dtype="f16", widths=WIDTHS), -1),
    (ExpertsCase("concat", "kn", stacked=False, bias=True, dtype="bf16", hidden=40, widths=WIDTHS), -1),
]


@pytest.fixture
def no_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has to run by itself."""

    def refuse(*_: object) -> None:
        raise AssertionError("the call went to aten")

    monkeypatch.setattr("moec.backends.aten.ExpertsKernel.forward", refuse)


@pytest.mark.usefixtures("no_aten")
@pytest.mark.parametrize(("case", "level"), RAGGED, ids=lambda v: case_id(v) if isinstance(v, ExpertsCase) else "")
def test_widths_of_their_own_are_the_loop(case: ExpertsCase, level: int) -> None:
    kernel = load(case.graph(), f"cpu:{HERE[level]}")
    for tokens in TOKENS:
        for skew in SKEWS:
            inputs = case.inputs(tokens, skew)
            got = kernel.forward(inputs)[0]
            assert relative_error(got, loop_experts(case, inputs)) <= TOLERANCE[case.dtype], (tokens, skew)


@pytest.mark.parametrize("level", [0, -1])
def test_a_token_has_the_same_bits_whatever_its_mates_and_the_threads(level: int) -> None:
    case = ExpertsCase(stacked=False, hidden=150, dtype="bf16", weight_dtype="f32", widths=WIDTHS)
    kernel, inputs = load(case.graph(), f"cpu:{HERE[level]}"), case.inputs(41)
    torch.set_num_threads(1)
    whole = kernel.forward(inputs)[0]
    for cut in (slice(0, 1), slice(7, 9), slice(3, 40)):
        assert torch.equal(kernel.forward([t[cut] for t in inputs[:3]] + inputs[3:])[0], whole[cut]), cut
    torch.set_num_threads(3)
    many = [torch.cat([t] * 20) for t in inputs[:3]] + inputs[3:]
    assert torch.equal(kernel.forward(many)[0], torch.cat([whole] * 20))


def test_an_expert_alone_has_the_bits_of_a_layer_of_its_width() -> None:
    """The widest expert's width pads the others; it must not show in their sums."""
    ragged = ExpertsCase(stacked=False, experts=2, top_k=1, hidden=40, widths=(300, 33))
    plain = ExpertsCase(stacked=False, experts=2, top_k=1, hidden=40, inner=33)
    inputs = ragged.inputs(9)
    inputs[1].fill_(1)
    alike = [*inputs[:3], inputs[4], inputs[4], inputs[6], inputs[6]]
    assert torch.equal(load(ragged.graph()).forward(inputs)[0], load(plain.graph()).forward(alike)[0])


def padded(t: Tensor) -> Tensor:
    return torch.cat([t, t], dim=-1)[..., : t.shape[-1]]


@pytest.mark.usefixtures("no_aten")
@pytest.mark.parametrize("widths", [(), WIDTHS], ids=["even", "ragged"])
@pytest.mark.parametrize(("layout", "form"), [("concat", "nk"), ("concat", "kn"), ("separate", "nk")])
def test_rows_of_experts_may_lie_apart_differently(layout: str, form: str, widths: tuple[int, ...]) -> None:
    case = ExpertsCase(layout, form, form, stacked=False, bias=True, widths=widths)
    kernel, inputs = load(case.graph()), case.inputs(9)
    want = loop_experts(case, inputs)
    # Every third expert's weights, and an even number of them apart: gate and up of an expert lie alike.
    moved = [padded(t) if i > 2 and (i - 3) % case.experts == 1 else t for i, t in enumerate(inputs)]
    spread = [torch.stack([t, t], dim=-1)[..., 0] if t.ndim == 1 and i % 2 else t for i, t in enumerate(moved)]
    for changed in (moved, spread):
        assert relative_error(kernel.forward(changed)[0], want) <= TOLERANCE["f32"]


def test_what_no_table_of_strides_can_say_goes_to_aten() -> None:
    case = ExpertsCase("separate", stacked=False)
    kernel, inputs = load(case.graph()), case.inputs(9)
    want = loop_experts(case, inputs)

    def turned(t: Tensor) -> Tensor:
        return t.t().contiguous().t()

    changes: list[tuple[int, Callable[[Tensor], Tensor]]] = [(3, padded), (3, turned), (14, turned)]
    for index, change in changes:  # the gate of an expert alone, and weights of one expert that are transposed
        moved = [change(t) if i == index else t for i, t in enumerate(inputs)]
        assert relative_error(kernel.forward(moved)[0], want) <= TOLERANCE["f32"], index


def test_gradients_are_atens() -> None:
    case = ExpertsCase("concat", up_form="nk", down_form="kn", stacked=False, bias=True, widths=(8, 3, 17, 1, 12))
    kernel = load(case.graph())
    oracle = AtenBackend().load(AtenBackend().lower(case.graph(), "cpu"))
    inputs = case.inputs(9)
    needs, grad = [t.is_floating_point() for t in inputs], torch.randn(9, case.hidden)
    for a, b in zip(kernel.backward([grad], inputs, needs), oracle.backward([grad], inputs, needs), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert relative_error(a, b) <= TOLERANCE["f32"]


def test_what_needs_one_width_is_refused() -> None:
    captured = ExpertsCase(stacked=False, captures=True, widths=WIDTHS).graph()
    assert "captured tensor of a width" in BACKEND.supports(captured.ops[0], "cpu").reason
    rows = ExpertsCase("rows", stacked=False, widths=WIDTHS).graph()
    assert "rows of shape [R, I]" in BACKEND.supports(rows.ops[0], "cpu").reason
