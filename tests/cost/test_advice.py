"""What calls make of the cost model: fewer threads for little work, the library where kernels lack instructions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
import moec.cost.library
import moec.predicted
from moec import op_costs
from moec.backends.base import Advice
from moec.backends.cpu import team
from moec.backends.cpu.build import compiler
from moec.cost import LayerShape, library_is_faster, threads_for
from moec.ir.core import Graph
from moec.ir.parser import parse_graph
from moec.op_costs import OpCosts, layer_shape
from moec.options import CompileOptions
from moec.passes import PassContext, PassResult
from moec.passes.dce import DeadCodeElimination
from moec.pipeline import run_pipeline
from moec.runtime import programs
from tests.cost.machines import round_machine

NEEDS_COMPILER = pytest.mark.skipif(compiler() is None, reason="the cpu backend needs a C++ compiler")
PROGRAM = """
graph @p(
  %x: f32[T, 16], %ids: i64[T, {k}], %w: f32[T, {k}], %up: f32[{e}, 48, 16], %down: f32[{e}, 16, 24]
) -> f32[T, 16] {{
  %y = moe.experts %x, %ids, %w, [%up], [%down] {{experts = {e}}} {{
    (%g: f32[R, 24], %u: f32[R, 24]) -> f32[R, 24] {{
      %s = torch.call @aten.silu.default(%g) : f32[R, 24]
      %m = torch.call @aten.mul.Tensor(%s, %u) : f32[R, 24]
      return %m
    }}
  }} : f32[T, 16]
  return %y
}}
"""
SAME = 1e-5
"""Of the kernel and the library, in f32."""
SMALL = LayerShape(16, 24, 16, experts=4, top_k=2)
LARGE = LayerShape(1024, 1024, 1024, experts=4, top_k=2)


def graph(experts: int = 4, k: int | str = 2) -> Graph:
    return parse_graph(PROGRAM.format(e=experts, k=k))


def inputs(tokens: int, experts: int = 4, k: int = 2) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen) * 0.3

    ids = torch.rand(tokens, experts, generator=gen).topk(k).indices
    return [draw(tokens, 16), ids, draw(tokens, k), draw(experts, 48, 16), draw(experts, 16, 24)]


class Asked:
    """An adviser that gives one answer and remembers what it was asked."""

    def __init__(self, answer: Advice) -> None:
        self.answer = answer
        self.questions: list[tuple[int, int]] = []

    def __call__(self, tokens: int, threads: int) -> Advice:
        self.questions.append((tokens, threads))
        return self.answer


@pytest.fixture(autouse=True)
def _own_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    programs.clear()
    yield
    programs.clear()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads that calls of kernels take, in order; torch is set to two."""
    found: list[int] = []
    take = team.SHARED.take
    monkeypatch.setattr(team.SHARED, "take", lambda wanted: found.append(wanted) or take(wanted))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return found


def test_little_work_is_for_one_thread() -> None:
    machine = round_machine()
    assert [threads_for(shape, tokens, machine, 2) for shape in (SMALL, LARGE) for tokens in (1, 512)] == [1, 2, 2, 2]
    assert threads_for(LARGE, 512, machine, 1) == 1


def test_a_machine_that_was_not_measured_gets_all_threads() -> None:
    machine = round_machine(calibrated=False)
    assert op_costs.team_for(SMALL, 1, machine, 2, "avx2") == 2
    assert op_costs.team_for(SMALL, 1, round_machine(), 2, "avx2") == 1


def test_an_op_is_read_as_its_layer() -> None:
    (op,) = (op for op in graph().ops if op.name == "moe.experts")
    assert layer_shape(op) == LayerShape(16, 24, 16, 4, 2, 2, "f32")
    costs = OpCosts(round_machine(), "avx2")
    time, advise = costs.predict(op, 1, 1), costs.advise(op)
    assert time is not None and time.seconds > 100e-6
    assert advise is not None and advise(1, 2) == Advice(1)


@pytest.mark.parametrize("text", [PROGRAM.format(e=4, k="K"), PROGRAM.format(e=4, k=2).replace("f32", "f64")])
def test_nothing_is_advised_where_sizes_or_types_are_not_known(text: str) -> None:
    (op,) = (op for op in parse_graph(text).ops if op.name == "moe.experts")
    assert layer_shape(op) is None and OpCosts(round_machine(), "avx2").advise(op) is None


@pytest.mark.parametrize("target", ["cuda:sm90", "cpu:neon"])
def test_nothing_is_known_of_other_targets(target: str) -> None:
    assert op_costs.op_costs(target) is None


@NEEDS_COMPILER
def test_a_call_takes_the_threads_that_are_advised(taken: list[int]) -> None:
    kernel = programs.register(graph(), "cpu").kernel()
    given = inputs(5)
    bits = []
    for answer in (Advice(1), Advice(2)):
        kernel.adviser = Asked(answer)
        bits.append(kernel.forward(list(given))[0])
        assert kernel.adviser.questions == [(5, 2)]
    kernel.adviser = None
    bits.append(kernel.forward(list(given))[0])
    assert taken == [1, 2, 2]
    assert bits[0].equal(bits[1]) and bits[0].equal(bits[2])


@NEEDS_COMPILER
def test_the_option_threads_has_the_last_word(taken: list[int]) -> None:
    kernel = programs.register(graph(), "cpu", CompileOptions(threads=2).backend_target).kernel()
    kernel.adviser = Asked(Advice(1))
    kernel.forward(inputs(5))
    assert taken == [2]


@NEEDS_COMPILER
def test_a_loaded_program_asks_the_stored_profile(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    costs = OpCosts(round_machine(), "avx2")
    monkeypatch.setattr(programs, "op_costs", lambda target: costs)
    kernel = programs.register(graph(), "cpu").kernel()
    for tokens in (1, 2000):
        kernel.forward(inputs(tokens))
    want = [threads_for(LayerShape(16, 24, 16, 4, 2, 2, "f32"), t, round_machine(), 2, "avx2") for t in (1, 2000)]
    assert taken == want and want[0] == 1


@NEEDS_COMPILER
def test_the_library_computes_the_same(taken: list[int]) -> None:
    """Forward and backward of one expert; the kernel takes no threads for it."""
    kernel = programs.register(graph(1, 1), "cpu").kernel()
    given = inputs(9, 1, 1)
    given[1].zero_()
    grads, needs = [torch.ones(9, 16)], [True, False, True, True, True]
    want = [kernel.forward(list(given))[0], *kernel.backward(grads, list(given), needs)]
    calls = len(taken)
    assert calls
    kernel.adviser = Asked(Advice(2, library=True))
    got = [kernel.forward(list(given))[0], *kernel.backward(grads, list(given), needs)]
    assert len(taken) == calls
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a - b).abs().max() <= SAME * b.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    ("experts", "isa", "tokens", "faster"),
    [
        (1, "avx2", 512, True),
        (1, "avx2", 1, False),  # reading the weights decides
        (1, "amx", 512, False),  # the kernel has the best instructions itself
        (4, "avx2", 512, False),  # no dense MLP
        (1, "avx2", 0, False),
    ],
)
def test_the_library_is_taken_where_kernels_lack_instructions(
    monkeypatch: pytest.MonkeyPatch, experts: int, isa: str, tokens: int, faster: bool
) -> None:
    monkeypatch.setattr(moec.cost.library, "best_level", lambda: "amx")
    machine = round_machine(flops=(("bf16", "avx2", 4e9), ("bf16", "amx", 400e9)))
    assert library_is_faster(LayerShape(512, 512, 512, experts, 1), tokens, machine, 1, isa) == faster


def test_one_expert_for_every_token_and_one_that_some_skip() -> None:
    """aten leaves rows where they are only if every id is the expert's."""
    from moec.backends.aten import ExpertsKernel

    (op,) = (op for op in graph(1, 1).ops if op.name == "moe.experts")
    op.attrs["sentinels"] = True
    given = inputs(6, 1, 1)
    given[1] = torch.tensor([[0], [1], [0], [-1], [0], [0]])
    (some,) = ExpertsKernel(op).forward(list(given))
    given[1] = torch.zeros_like(given[1])
    (every,) = ExpertsKernel(op).forward(list(given))
    assert not some[[1, 3]].any() and every.abs().amin(1).gt(0).all()
    torch.testing.assert_close(some[[0, 2, 4, 5]], every[[0, 2, 4, 5]])


def test_passes_find_the_cost_model_in_their_context(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(self: Any, graph: Graph, ctx: PassContext) -> PassResult:
        seen.append(ctx.cost_model)
        return PassResult(False)

    monkeypatch.setattr(DeadCodeElimination, "run", run)
    run_pipeline(graph(), CompileOptions(passes="dce"))
    run_pipeline(graph(), CompileOptions(passes="dce", target="cuda:sm90"))
    assert isinstance(seen[0], OpCosts) and seen[1] is None


def test_explain_shows_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.compile.blocks import Block, tokens

    monkeypatch.setattr(moec.predicted, "machine_for", lambda target: round_machine())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    chosen = [p["threads"] for p in moec.explain(Block(), (tokens(),), target="cpu:avx2").layers[0].predicted]
    assert chosen[0] == 1 and chosen[-1] == 2
    report = moec.explain(Block(), (tokens(),), target="cpu:avx2", threads=2)
    assert {p["threads"] for p in report.layers[0].predicted} == {2}
    assert "threads" in str(report)
