"""``raise-moe`` on Python loops over experts: any routing, any number of experts, exported programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim, export

import moec
from moec.backends.reference.interpreter import run_graph
from moec.ir.core import Graph, Op
from moec.ir.parser import parse_graph
from moec.passes import PassContext, PassManager
from tests.passes.layers import capture
from tests.slicing import loop_layers

HIDDEN, INNER = 8, 6
FUSE = "functionalize,canonicalize,cse,raise-moe,fuse-experts,cse,dce"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest |difference| / max(1, max |value|). In bf16 the loop rounds after every expert, the block once."""
SEARCHES = ("nonzero", "where", "index_put", "index_add")


def loop(ids_of: Callable[[int], int], *, half: bool, keep: bool) -> Callable[..., Tensor]:
    """A loop as a function of x, ids, w, and three matrices per expert.

    Args:
        ids_of: The id that every expert's tokens have.
        half: Start at the tokens themselves instead of zero.
        keep: Count choices with a positive weight only.
    """

    def run(x: Tensor, ids: Tensor, w: Tensor, *matrices: Tensor) -> Tensor:
        out = x.clone() if half else torch.zeros_like(x)
        for e in range(len(matrices) // 3):
            w1, w3, w2 = matrices[3 * e : 3 * e + 3]
            mask = ids == ids_of(e)
            token, slot = torch.where(mask & (w > 0) if keep else mask)
            rows = x[token]
            rows = F.linear(F.silu(F.linear(rows, w1)) * F.linear(rows, w3), w2)
            out.index_add_(0, token, (rows * w[token, slot, None]).to(out.dtype))
        return out

    return run


def inputs(tokens: int, experts: int, top_k: int, dtype: torch.dtype, routing: str) -> list[Tensor]:
    gen = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=gen) * 0.5).to(dtype)

    shape = tokens, top_k
    ids = {
        "random": lambda: torch.randint(0, experts, shape, generator=gen),  # with repetitions inside a token
        "one takes all": lambda: torch.full(shape, experts - 1),
        "distinct": lambda: torch.rand(tokens, max(experts, top_k), generator=gen).argsort(1)[:, :top_k],
        "out of range": lambda: torch.randint(-2, experts + 3, shape, generator=gen),
    }[routing]()
    matrices = [normal(*s) for _ in range(experts) for s in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))]
    return [normal(tokens, HIDDEN), ids, normal(tokens, top_k), *matrices]


def fused(graph: Graph) -> Op:
    """The one ``moe.experts`` that is left of a graph's loop."""
    left = [op.attrs["target"] for op in graph.ops if op.name == "torch.call"]
    assert not any(name in target for target in left for name in SEARCHES), left
    (op,) = [op for op in graph.ops if op.name == "moe.experts"]
    return op


def near(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    if want.numel():
        error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1)
        assert error <= TOLERANCE[want.dtype], f"off by {error:.3g}"


def raised(run: Callable[..., Any], args: Sequence[Tensor]) -> Graph:
    graph = capture(run, args, dynamic=range(3))
    return PassManager(FUSE, repro=None).run(graph, PassContext())


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate], deadline=None, derandomize=True)
@given(
    experts=st.sampled_from([2, 4, 8]),
    top_k=st.sampled_from([1, 2, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    numbers=st.sampled_from(["from 0", "from 3", "with gaps", "falling"]),
    half=st.booleans(),
    keep=st.booleans(),
)
def test_any_routing_of_any_loop(
    experts: int, top_k: int, dtype: torch.dtype, numbers: str, half: bool, keep: bool
) -> None:
    ids_of = {
        "from 0": lambda e: e,
        "from 3": lambda e: e + 3,
        "with gaps": lambda e: 1 + e + (e > 0) + 2 * (e > 1),
        "falling": lambda e: experts - 1 - e,
    }[numbers]
    run = loop(ids_of, half=half, keep=keep)
    graph = raised(run, inputs(5, experts, top_k, dtype, "random"))
    assert fused(graph).attrs["sentinels"] is True  # nothing is known about the ids
    for tokens in (0, 1, 13):
        for routing in ("random", "one takes all", "distinct", "out of range"):
            args = inputs(tokens, experts, top_k, dtype, routing)
            near(run_graph(graph, args)[0], run(*args))


def written(experts: int) -> str:
    """The text of a traced loop over ``experts`` experts."""
    args = ["%x: f32[T, 8]", "%ids: i64[T, 2]", "%w: f32[T, 2]"]
    body = ["%s = torch.call @aten.zeros_like.default(%x) : f32[T, 8]"]
    total = "%s"
    for e in range(experts):
        args += [f"%a{e}: f32[6, 8]", f"%b{e}: f32[6, 8]", f"%c{e}: f32[8, 6]"]
        body += [
            f"%m{e} = torch.call @aten.eq.Scalar(%ids, {e}) : i1[T, 2]",
            f"%t{e}, %k{e} = torch.call @aten.where.default(%m{e}) : i64[u{e}], i64[u{e}]",
            f"%r{e} = torch.call @aten.index.Tensor(%x, [%t{e}]) : f32[u{e}, 8]",
            f"%g{e} = torch.call @aten.linear.default(%r{e}, %a{e}) : f32[u{e}, 6]",
            f"%u{e} = torch.call @aten.linear.default(%r{e}, %b{e}) : f32[u{e}, 6]",
            f"%i{e} = torch.call @aten.silu.default(%g{e}) : f32[u{e}, 6]",
            f"%h{e} = torch.call @aten.mul.Tensor(%i{e}, %u{e}) : f32[u{e}, 6]",
            f"%o{e} = torch.call @aten.linear.default(%h{e}, %c{e}) : f32[u{e}, 8]",
            f"%v{e} = torch.call @aten.index.Tensor(%w, [%t{e}, %k{e}]) : f32[u{e}]",
            f"%n{e} = torch.call @aten.unsqueeze.default(%v{e}, -1) : f32[u{e}, 1]",
            f"%p{e} = torch.call @aten.mul.Tensor(%o{e}, %n{e}) : f32[u{e}, 8]",
            f"%y{e} = torch.call @aten.index_add.default({total}, 0, %t{e}, %p{e}) : f32[T, 8]",
        ]
        total = f"%y{e}"
    lines = "\n".join(f"  {line}" for line in (*body, f"return {total}"))
    return f"graph @loop({', '.join(args)}) -> f32[T, 8] {{\n{lines}\n}}"


@pytest.mark.parametrize("experts", [4, 64])
def test_many_experts_are_one_op_with_a_list_of_weights(experts: int) -> None:
    graph = PassManager("raise-moe,fuse-experts,dce", repro=None).run(parse_graph(written(experts)), PassContext())
    assert len(graph.ops) == 2
    op = fused(graph)
    assert op.attrs["stacked"] is False and len(op.group("up")) == 2 * experts and len(op.group("down")) == experts
    args = inputs(40, experts, 2, torch.float32, "distinct")
    near(run_graph(graph, args)[0], loop(lambda e: e, half=False, keep=False)(*args))


def test_the_pass_reads_a_loop_in_linear_time() -> None:
    """Counted in looks at operands, because clocks are no measure on a busy machine."""

    def looks(experts: int) -> int:
        graph, count = parse_graph(written(experts)), 0
        plain = Op.operands.fget  # type: ignore[attr-defined]

        def counted(op: Op) -> tuple[Any, ...]:
            nonlocal count
            count += 1
            return plain(op)  # type: ignore[no-any-return]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Op, "operands", property(counted))
            PassManager("raise-moe,fuse-experts", repro=None, verify=False).run(graph, PassContext())
        fused(PassManager("dce", repro=None).run(graph, PassContext()))
        return count

    assert looks(64) < 2.5 * looks(32)


def test_ids_of_a_choice_among_the_loops_experts_need_no_sentinels() -> None:
    args = inputs(6, 4, 2, torch.float32, "distinct")
    run = loop(lambda e: e, half=False, keep=False)

    def routed(columns: int) -> Callable[..., Tensor]:
        return lambda x, _, w, *matrices: run(x, x[:, :columns].topk(2, dim=-1).indices, w, *matrices)

    assert fused(raised(routed(4), args)).attrs["sentinels"] is False
    assert fused(raised(routed(5), args)).attrs["sentinels"] is True


@pytest.mark.parametrize(
    ("name", "decomposed"),
    [("OneHot", False), *((n, True) for n in ("OneHot", "Top1", "Slots", "ZeroCompute", "Chosen", "Dense"))],
)
def test_exported_programs(name: str, decomposed: bool) -> None:
    model = getattr(loop_layers, name)()
    x = torch.randn(6, loop_layers.H, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        program = export(model, (x,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
        program = program.run_decompositions() if decomposed else program
        with moec.recording() as report:
            optimized = moec.optimize(program, backends=["aten"])
        assert [b.fused for b in report.layers] == [True]
        got, want = optimized.module()(x[:5]), model(x[:5])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
