"""Steps of several micro-batches through the compile door: the blocks of a layer meet, or stay apart and say why.

The reference is the same step without the pass. The cpu backend gives a row the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.backends.cpu.build import compiler
from moec.report import Report
from moec.runtime import counters
from tests.compile.blocks import HIDDEN, Block, Layers, tokens

GRADIENTS = 1e-5
"""Of experts' weights, relative to the largest: their sums over tokens run in another order."""
ALWAYS = "default,reschedule-tokens{always=true}"

pytestmark = pytest.mark.skipif(compiler() is None, reason="the cpu backend needs a C++ compiler")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def compiled(step: Any, passes: str = ALWAYS, inner: str = "eager") -> Any:
    options = {"inner": inner, "passes": passes}
    return torch.compile(step, backend="moec", options=options, fullgraph=True, dynamic=True)


def ran(step: Any, *inputs: Tensor, passes: str = ALWAYS) -> tuple[Any, dict[str, int], Report]:
    """What a step gives without gradients, the runtime ops that ran, and the report."""
    counters.reset()
    torch.manual_seed(0)
    with moec.recording() as report, torch.no_grad():
        out = compiled(step, passes)(*inputs)
    return out, dict(counters.snapshot().by_name), report


def stays(step: Any, reason: str, *inputs: Tensor, passes: str = ALWAYS) -> None:
    """The step runs as without the pass, and each block says why."""
    got, found, report = ran(step, *inputs, passes=passes)
    want, _, plain = ran(step, *inputs, passes="default")
    assert "moec::regroup" not in found
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert len(report.layers) == len(plain.layers) > 1 and report.all_fused
    assert any(reason in remark for remark in report.layers[0].remarks), report.layers[0].remarks


def train(model: nn.Module, run: Any, *inputs: Tensor) -> list[Tensor]:
    """Results, then gradients of the tokens and of the parameters."""
    model.zero_grad()
    given = [x.clone().requires_grad_() for x in inputs]
    out = run(*given)
    sum(x.square().sum() for x in out).backward()
    return [*(x.detach() for x in out), *(x.grad for x in given), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]


def two(model: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda a, b: (model(a), model(b))


def test_every_layer_sees_the_tokens_of_both() -> None:
    step = two(Layers(Block(seed=1), Block(seed=2)))
    for sizes in ((12, 9), (1, 0)):
        inputs = [tokens(n, seed=n) for n in sizes]
        got, found, report = ran(step, *inputs)
        want, plain, _ = ran(step, *inputs, passes="default")
        assert found == {**plain, "moec::regroup": 2}
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert len(report.layers) == 4 and report.all_fused
        assert all(any("2 micro-batches regrouped" in r for r in layer.remarks) for layer in report.layers)


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_training_step_keeps_all_bits_under_deterministic_algorithms(inner: str, deterministic: None) -> None:
    model = Layers(Block(seed=1), Block(seed=2))
    run, plain = compiled(two(model), inner=inner), compiled(two(model), "default", inner)
    inputs = tokens(12), tokens(9, seed=2)
    counters.reset()
    got = train(model, run, *inputs)
    found = counters.snapshot().by_name
    assert (found["moec::regroup"], found["moec::experts"], found["moec::experts_backward"]) == (2, 4, 4)
    want = train(model, plain, *inputs)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))

    torch.use_deterministic_algorithms(False)  # the step is compiled anew: backwards are regrouped, too
    loose = train(model, run, *inputs)
    assert all(torch.equal(g, w) for g, w in zip(loose[:4], want[:4], strict=True))
    assert not all(torch.equal(g, w) for g, w in zip(loose[4:], want[4:], strict=True))
    for g, w in zip(loose[4:], want[4:], strict=True):
        assert (g - w).abs().max() <= GRADIENTS * w.abs().max()


def test_three_share_their_tokens_and_a_pair_of_three_does() -> None:
    model = Layers(Block(seed=1))
    step = lambda a, b, c: (model(a), model(b), model(c))  # noqa: E731
    inputs = [tokens(n, seed=n) for n in (7, 5, 6)]
    want, _, _ = ran(step, *inputs, passes="default")
    for passes, joined in (("default,reschedule-tokens{batches=3,always=true}", 3), (ALWAYS, 2)):
        got, found, report = ran(step, *inputs, passes=passes)
        assert found["moec::regroup"] == 1
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert sum(any("regrouped" in r for r in layer.remarks) for layer in report.layers) == joined


def test_what_changes_the_grad_mode_moves_as_a_whole() -> None:
    block = Layers(Block(seed=1), Block(seed=2))

    def one(x: Tensor) -> Tensor:
        x = x + block.layers[0](x)
        with torch.no_grad():
            scale = x.abs().amax() + 1
        return block.layers[1](x / scale) * scale  # type: ignore[no-any-return]

    step = lambda a, b: (one(a), one(b))  # noqa: E731
    inputs = tokens(6), tokens(7, seed=2)
    want = train(block, compiled(step, "default"), *inputs)
    counters.reset()
    got = train(block, compiled(step), *inputs)
    assert counters.snapshot().by_name["moec::regroup"] == 2
    assert all(torch.equal(g, w) for g, w in zip(got[:4], want[:4], strict=True))


def test_writes_keep_their_order() -> None:
    block, seen = Block(seed=1), torch.zeros(HIDDEN)

    def one(x: Tensor) -> Tensor:
        y = block(x)
        y += seen  # reads what the other micro-batch must write later
        seen.add_(y.sum(0))
        return y

    inputs = tokens(6), tokens(7, seed=2)
    got, found, _ = ran(lambda a, b: (one(a), one(b), seen.clone()), *inputs)
    assert found["moec::regroup"] == 1
    seen.zero_()
    want, _, _ = ran(lambda a, b: (one(a), one(b), seen.clone()), *inputs, passes="default")
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_layers_of_one_weight_are_no_micro_batches() -> None:
    block = Block()
    stays(lambda x: (block(block(x)),), "one micro-batch depends on another's result", tokens(6))


def test_nor_where_one_reads_memory_that_the_other_writes() -> None:
    block, seen = Block(seed=1), torch.zeros(HIDDEN)

    def step(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first = block(a)
        seen.copy_(first.sum(0))
        return first, block(b + seen)

    stays(step, "one micro-batch depends on another's result", tokens(6), tokens(7, seed=2))


def test_random_numbers_are_drawn_in_their_order() -> None:
    block = Block()

    def one(x: Tensor, p: float) -> Tensor:
        return nn.functional.dropout(block(x), p)

    stays(lambda a, b: (torch.rand_like(block(a)), block(b)), "rand_like has an effect", tokens(6), tokens(7))
    stays(lambda a, b: (one(a, 1.0), one(b, 1.0)), "dropout has an effect", tokens(6), tokens(7))
    _, found, _ = ran(lambda a, b: (one(a, 0.0), one(b, 0.0)), tokens(6), tokens(7))
    assert found["moec::regroup"] == 1


def test_micro_batches_in_two_grad_modes_stay_apart() -> None:
    block = Block()

    def step(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            first = block(a)
        return first.detach(), block(b)

    stays(step, "different grad modes", tokens(6), tokens(7))


def test_without_a_profile_nothing_is_moved() -> None:
    stays(two(Block()), "there is no routing profile", tokens(6), tokens(7), passes="default,reschedule-tokens")


def test_layers_of_other_weights_have_nothing_to_share() -> None:
    first, second = Block(seed=1), Block(seed=2)
    stays(lambda a, b: (first(a), second(b)), "no 2 micro-batches go through the layer", tokens(6), tokens(7))
