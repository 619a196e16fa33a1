"""Weights that are not plain parameters: computed, masked, shared, frozen, wrapped, or seen through odd strides.

A block with such weights is fused and right, or left to PyTorch with its reason; never wrong.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import moec
from moec import MoecWarning
from moec.backends.cpu.build import compiler
from tests.compile.blocks import EXPERTS, HIDDEN, INNER, Block, Layers, tokens
from tests.compile.watch import moec_compile

SAME = 1e-5  # fp32, sums in another order; relative to max(1, largest element)
WEIGHTS = ("gate_up", "down")
NEEDS_COMPILER = pytest.mark.skipif(compiler() is None, reason="the cpu backend needs a C++ compiler")
BACKENDS = ["aten", pytest.param("cpu", marks=NEEDS_COMPILER)]


def same(got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        assert got.shape == want.shape and got.dtype == want.dtype
        assert (got - want).abs().max() <= SAME * want.abs().max().clamp(min=1)


def gradients(model: nn.Module, run: Any, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The output of one step, and the gradients of all parameters and of the tokens (under the name "")."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().mean().backward()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return out.detach(), {**found, "": x.grad}


def same_step(model: nn.Module, compiled: Any, count: int = 7) -> dict[str, torch.Tensor | None]:
    """Compare a training step; the gradients are eager's, missing ones included."""
    want_out, want = gradients(model, model, tokens(count))
    got_out, got = gradients(model, compiled, tokens(count))
    same(got_out, want_out)
    for name, gradient in want.items():
        same(got[name], gradient)
    return got


# --- computed weights -----------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """W -> W + B A for every expert."""

    def __init__(self, experts: int, rows: int, columns: int, rank: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(experts, rank, columns, generator=generator) * 0.3)
        self.b = nn.Parameter(torch.randn(experts, rows, rank, generator=generator) * 0.3)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + torch.bmm(self.b, self.a)


def low_rank(block: Block) -> None:
    parametrize.register_parametrization(block, "gate_up", LowRank(EXPERTS, 2 * INNER, HIDDEN))
    parametrize.register_parametrization(block, "down", LowRank(EXPERTS, HIDDEN, INNER))


def normed(block: Block) -> None:
    weight_norm(block, "down", dim=0)


def pruned(block: Block) -> None:
    prune.random_unstructured(block, "gate_up", 0.5)
    prune.l1_unstructured(block, "down", 0.25)


COMPUTED: dict[str, tuple[Callable[[Block], None], str]] = {
    "low rank": (low_rank, "original"),
    "weight norm": (normed, "original0"),
    "pruning": (pruned, "gate_up_orig"),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_right_and_their_cost_is_told_once(kind: str) -> None:
    change, source = COMPUTED[kind]
    plain = Layers(Block(), Block(seed=1))
    model = copy.deepcopy(plain)
    for block in model.layers:
        change(block)
    compiled = moec_compile(model)
    with moec.recording() as report, torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = compiled(tokens())
    same(got, model(tokens()))
    if kind != "weight norm":  # which starts at the weight it is given
        assert (got - plain(tokens())).abs().max() > 1e-2, "the change changed nothing: the test is blind"
    assert report.all_fused
    (told,) = [str(w.message) for w in caught if issubclass(w.category, MoecWarning)]
    assert report.remarks == [told]
    assert "expert weights are computed in every call" in told
    assert source in told
    assert "merge_and_unload" in told


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_train(kind: str) -> None:
    model = Layers(Block(), Block(seed=1))
    for block in model.layers:
        COMPUTED[kind][0](block)
    with warnings.catch_warnings(), moec.recording() as report:
        warnings.simplefilter("error", MoecWarning)  # in training they have to be computed: nothing to warn of
        found = same_step(model, moec_compile(model))
    assert report.all_fused
    assert len(report.remarks) == 1
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found.values())


def test_plain_weights_have_no_such_remark() -> None:
    with moec.recording() as report:
        moec_compile(Layers(Block()))(tokens())
    assert report.all_fused
    assert not report.remarks


def test_weights_made_plain_again_have_no_such_remark() -> None:
    model = Layers(Block())
    low_rank(model.layers[0])
    for name in WEIGHTS:
        parametrize.remove_parametrizations(model.layers[0], name)
    with moec.recording() as report:
        same(moec_compile(model)(tokens()), model(tokens()))
    assert report.all_fused
    assert not report.remarks


def test_weights_that_are_cast_in_every_call_are_told_in_the_report_alone() -> None:
    """As autocast does, and as PyTorch's own path does too."""
    model = Layers(Block().double())
    model.layers[0].router.data = model.layers[0].router.data.float()

    def forward(x: torch.Tensor) -> torch.Tensor:
        parameters = {name: p.float() for name, p in model.layers[0].named_parameters()}
        return torch.func.functional_call(model.layers[0], parameters, (x,))

    with moec.recording() as report, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", MoecWarning)
        same(moec_compile(forward)(tokens()), forward(tokens()))
    assert report.all_fused
    (told,) = report.remarks
    assert "from gate_up, down" in told


# --- frozen, shared, accumulated ------------------------------------------------------------------------------------

TRAINED = {
    "experts only": lambda name: name.endswith(WEIGHTS),
    "router only": lambda name: name.endswith("router"),
    "one layer": lambda name: name.startswith("layers.1"),
    "one weight": lambda name: name == "layers.0.down",
    "nothing": lambda name: False,
}


class Asked(TorchDispatchMode):
    """Notes which gradients every ``moec::experts_backward`` is asked for, and how many tensors it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[list[bool], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name == "moec::experts_backward":
            self.asked.append((list(args[5]), len(out)))
        return out


@pytest.mark.parametrize(
    ("kind", "backend"),
    [*((kind, "aten") for kind in TRAINED), pytest.param("one weight", "cpu", marks=NEEDS_COMPILER)],
)
def test_frozen_weights_get_no_gradient_and_cost_none(kind: str, backend: str) -> None:
    model = Layers(Block(), Block(seed=1))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED[kind](name))
    compiled = moec_compile(model, backends=[backend])
    same_step(model, compiled)
    loss = compiled(tokens(7).requires_grad_()).square().mean()
    with Asked() as seen:
        loss.backward()
    want = [[p.requires_grad for p in (b.gate_up, b.down)] for b in reversed(model.layers)]
    assert [asked[3:] for asked, _ in seen.asked] == want
    assert all(given == sum(asked) for asked, given in seen.asked)


def test_freezing_between_calls_is_seen() -> None:
    model = Layers(Block(), Block(seed=1))
    compiled = moec_compile(model)
    same_step(model, compiled)
    model.layers[0].down.requires_grad_(False)
    assert same_step(model, compiled)["layers.0.down"] is None
    model.layers[0].down.requires_grad_(True)
    assert same_step(model, compiled)["layers.0.down"] is not None


def test_accumulation_with_evaluation_and_steps_in_between() -> None:
    ours, theirs = Layers(Block(), Block(seed=1)), Layers(Block(), Block(seed=1))
    compiled = moec_compile(ours, inner="aot_eager")
    for model, run in ((ours, compiled), (theirs, theirs)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            for part in range(3):
                run(tokens(5, seed=part)).square().mean().backward()
                with torch.no_grad():
                    model.seen = run(tokens(5, seed=9))  # type: ignore[assignment]
            optimizer.step()
    same(ours.seen, theirs.seen)  # type: ignore[arg-type]
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_experts_module_used_twice(backend: str) -> None:
    block = Block()
    model = Layers(block, Block(seed=1), block)
    with moec.recording() as report:
        same_step(model, moec_compile(model, backends=[backend]))
    assert [b.fused for b in report.layers] == [True] * 3


def test_two_layers_that_share_one_weight() -> None:
    model = Layers(Block(), Block(seed=1))
    model.layers[1].down = model.layers[0].down
    with moec.recording() as report:
        same_step(model, moec_compile(model))
    assert report.all_fused
