"""Weights are read where they lie: whatever is done to them, the compiled model computes with what is there now."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moec
from tests.compile.blocks import Block, Layers, tokens
from tests.compile.watch import Watch, moec_compile
from tests.support.models import build, inputs

SAME = 1e-6
CHANGED = 1e-3


def noise(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(3)) * 0.3


def load(model: nn.Module) -> None:
    model.load_state_dict({k: noise(v) if v.dim() > 1 else v.clone() for k, v in model.state_dict().items()})


def assign(model: nn.Module) -> None:
    model.load_state_dict({k: noise(v) + v for k, v in model.state_dict().items()}, assign=True)


def optimise(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = noise(p)
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def set_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = noise(p.data) - p.data


def replace(model: nn.Module) -> None:
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(noise(p) * 0.5 + p.detach()))


def add_in_place(model: nn.Module) -> None:
    for p in model.parameters():
        p.add_(noise(p))


CHANGES: tuple[Callable[[nn.Module], None], ...] = (load, assign, optimise, set_data, replace, add_in_place)


@torch.no_grad()
def check(model: nn.Module, run: Callable[[Any], torch.Tensor], inner: str) -> None:
    seen = Watch(model)
    compiled = moec_compile(model, inner=inner, watch=seen)
    before = run(compiled)
    with moec.recording() as later, torch._dynamo.config.patch(error_on_recompile=True):
        for change in CHANGES:
            change(model)
            seen.params.clear()
            got, want = run(compiled), run(model)
            what = change.__name__
            assert (got - want).abs().max() <= SAME * want.abs().max().clamp(min=1), what
            assert (got - before).abs().max() > CHANGED, f"{what} changed nothing: the test is blind"
            stacked = {p.data_ptr() for p in model.parameters() if p.dim() == 3}
            assert stacked <= seen.params, f"after {what} the op is not given the parameters' own memory"
            before = got
    assert later.graphs == 0


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_block(inner: str) -> None:
    x = tokens()
    check(Layers(Block(), Block(seed=1)), lambda f: f(x), inner)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_whole_model(family: str) -> None:
    batch = inputs(family, 2, 12)
    check(build(family, layers=1), lambda f: f(**batch).logits, "aot_eager")


def test_training_sees_its_own_updates() -> None:
    """Three optimizer steps, compiled and not, end at the same weights."""
    x = tokens(7)
    ours, theirs = Layers(Block()), Layers(Block())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    start = copy.deepcopy(ours.state_dict())
    compiled = moec_compile(ours, inner="aot_eager")
    with moec.recording() as report:
        for model, run in ((ours, compiled), (theirs, theirs)):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            for _ in range(3):
                optimizer.zero_grad()
                run(x).square().mean().backward()
                optimizer.step()
    assert report.graphs == 1
    assert report.all_fused
    for name, got in ours.state_dict().items():
        want = theirs.state_dict()[name]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        assert (got - start[name]).abs().max() > 10 * 1e-4
