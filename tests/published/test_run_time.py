"""What changes between calls without a new compile: how many experts a token has, what is added to the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.report import BlockReport, Report
from tests.published.experts import EXPERTS, HIDDEN, Experts, made
from tests.published.harness import OPTIONS, Tokens, near

MOST = 3


class Routed(nn.Module):
    """Softmax, top-k, renormalised; the cases override the router."""

    def __init__(self, form: str = "batched", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gate = made(10, EXPERTS, HIDDEN, scale=1.0)
        self.experts = Experts(form, dtype)

    def scores(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.gate).softmax(-1)

    def choose(self, p: Tensor, k: int) -> tuple[Tensor, Tensor]:
        w, ids = torch.topk(p, k)
        return w / w.sum(-1, keepdim=True), ids

    def forward(self, x: Tensor, k: int = 2) -> Tensor:
        w, ids = self.choose(self.scores(x), k)
        out: Tensor = self.experts(x, ids, w)
        return out


class MaskedK(Routed):
    """k is a tensor: slots past it have weight 0."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.tensor(2))

    def choose(self, p: Tensor, k: int) -> tuple[Tensor, Tensor]:
        w, ids = torch.topk(p, MOST)
        w = torch.where(torch.arange(MOST) < self.k, w, 0.0)
        return w / w.sum(-1, keepdim=True), ids


class AttributeK(Routed):
    """k is an int that the user changes on the module."""

    k = 2

    def forward(self, x: Tensor, k: int = 2) -> Tensor:
        return super().forward(x, self.k)


class Steered(Routed):
    """Logits are scaled and shifted by buffers that somebody writes to between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(EXPERTS))
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def scores(self, x: Tensor) -> Tensor:
        return (F.linear(x.float(), self.gate) * self.factor + self.bias).softmax(-1)


class Contrasted(Routed):
    """The answer of many experts against that of few: one set of weights, two forwards."""

    def forward(self, x: Tensor, k: int = 2) -> Tensor:
        return 1.5 * super().forward(x, 3) - 0.5 * super().forward(x, 1)


@contextmanager
def compiled(model: nn.Module) -> Iterator[tuple[Callable[..., Tensor], list[Report]]]:
    """``(the compiled model, one report per compile)``."""
    torch._dynamo.reset()
    seen: list[Report] = []
    yield torch.compile(model, backend="moec", fullgraph=True, options=OPTIONS | {"report": seen.append}), seen


def check(run: Callable[..., Tensor], model: nn.Module, calls: Sequence[tuple[Any, ...]]) -> None:
    with torch.no_grad():
        for tokens, *rest in calls:
            x = Tokens(tokens).make(torch.float32)
            near(run(x, *rest), model(x, *rest), f"{tokens} tokens, {rest}")


def blocks(seen: list[Report]) -> list[BlockReport]:
    found = [b for r in seen for b in r.layers]
    assert found and all(b.fused for b in found), [b.reason for b in found]
    return found


@pytest.mark.parametrize("form", ["batched", "grouped"])
def test_k_given_as_a_number_is_compiled_once_for_all(form: str) -> None:
    """Dynamo makes the first k a constant, the second one a symbol."""
    dtype = torch.bfloat16 if form == "grouped" else torch.float32
    model = Routed(form, dtype)
    with compiled(model) as (run, seen), torch.no_grad():
        for tokens, k in ((9, 2), (9, 3), (9, 4), (5, 3), (12, 2)):
            x = Tokens(tokens).make(dtype)
            near(run(x, k), model(x, k), f"{tokens} tokens, k = {k}", dtype)
    assert len(seen) <= 3, "first, another k, another number of tokens"
    last = blocks(seen)[-1]
    assert last.top_k is None, "k is no number in the last program"
    assert "moe.route" not in last.ir_after
    assert any("k is computed at run time" in r for r in last.remarks)


def test_k_in_a_buffer_needs_no_second_compile() -> None:
    model = MaskedK()
    with compiled(model) as (run, seen):
        for k in (2, 1, 3):
            model.k.fill_(k)
            check(run, model, [(9,)])
            x = Tokens(9).make(torch.float32)
            with torch.no_grad():
                near(run(x), Routed()(x, k), f"the layer of top-{k}")
    assert len(seen) == 1
    assert blocks(seen)[0].top_k == MOST


def test_k_on_a_module_is_a_constant_unless_dynamo_is_asked() -> None:
    """Why a buffer or an argument is the way."""
    model = AttributeK()
    for free, compiles in ((False, 3), (True, 2)):
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=free), compiled(model) as (run, seen):
            for k in (2, 3, 4):
                model.k = k
                check(run, model, [(9,)])
            assert len(seen) == compiles
            blocks(seen)


def test_logits_are_steered_by_buffers() -> None:
    model = Steered()
    with compiled(model) as (run, seen), torch.no_grad():
        x = Tokens(9).make(torch.float32)
        plain = run(x)
        for name, index, value in (("bias", 0, -torch.inf), ("bias", 1, 20.0), ("factor", 2, -3.0)):
            getattr(model, name)[index] = value
            before, plain = plain, run(x)
            near(plain, model(x), f"{name}[{index}] = {value}")
            assert not torch.allclose(before, plain), "the change is not seen"
    assert len(seen) == 1
    assert "moe.route" in blocks(seen)[0].ir_after


def test_two_numbers_of_experts_in_one_model() -> None:
    model = Contrasted()
    with compiled(model) as (run, seen):
        check(run, model, [(9,), (9,)])
    assert len(seen) == 1
    assert sorted(b.top_k or 0 for b in blocks(seen)) == [1, 3]


def test_gradients_where_k_is_a_symbol() -> None:
    model = Routed()
    with compiled(model) as (run, seen):
        for k in (2, 3, 4):
            got = torch.autograd.grad(run(Tokens(9).make(torch.float32), k).square().sum(), list(model.parameters()))
            want = torch.autograd.grad(model(Tokens(9).make(torch.float32), k).square().sum(), list(model.parameters()))
            for a, b in zip(got, want, strict=True):
                near(a, b, f"k = {k}")
    assert len(seen) == 2
