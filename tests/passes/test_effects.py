"""What ops write to and share, held against what torch does; and functionalize held against running the program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.backends.reference.interpreter import run_graph
from moec.ir.core import Graph, Value
from moec.ir.parser import parse_graph
from moec.ir.verifier import verify
from moec.passes import PassContext, PassManager
from moec.passes.aliases import AliasSets
from moec.passes.effects import FRESH_COMPOSITES, is_pure, shared_operands, written_operands
from moec.passes.twins import functional_twin
from tests.passes.numeric import assert_preserves

CLEANUP = "functionalize,cleanup"


def one_op(call: str, result: str = "f32[4, 4]", args: str = "%x: f32[4, 4], %y: f32[4, 4], %i: i64[4]") -> Graph:
    return parse_graph(f"graph @o({args}) -> {result} {{\n  %r = torch.call {call} : {result}\n  return %r\n}}")


@pytest.mark.parametrize(
    ("call", "shared", "written"),
    [
        ("@aten.add.Tensor(%x, %y)", set(), set()),
        ("@aten.view.default(%x, [16])", {0}, set()),
        ("@aten.reshape.default(%x, [16])", {0}, set()),
        ("@aten.contiguous.default(%x)", {0}, set()),
        ("@aten.to.dtype(%x, f32)", {0}, set()),
        ("@aten.type_as.default(%x, %y)", {0, 1}, set()),
        ("@aten.dropout.default(%x, 0.5, false)", {0}, set()),
        ("@aten.linear.default(%x, %y)", set(), set()),
        ("@aten.chunk.default(%x, 2)", {0}, set()),
        ("@aten._unsafe_view.default(%x, [16])", {0}, set()),
        ("@aten.add_.Tensor(%x, %y)", {0}, {0}),
        ("@aten.index_put_.default(%x, [%i], %y)", {0}, {0}),
        ("@aten.sort.values(%x, values = %y, indices = %i)", {1, 2}, {1, 2}),
        ("@py._operator.getitem(%x, 0)", {0}, set()),
        ("@py._operator.iadd(%x, %y)", {0, 1}, {0}),
    ],
)
def test_sharing_and_writing(call: str, shared: set[int], written: set[int]) -> None:
    op = one_op(call).ops[0]
    assert (shared_operands(op), written_operands(op)) == (shared, written)
    assert not (written and is_pure(op)), "what writes is not pure"


PROBES: dict[str, Any] = {
    "linear": lambda x: torch.ops.aten.linear(x, torch.eye(4)),
    "matmul": lambda x: torch.ops.aten.matmul(x, torch.eye(4)),
    "softmax": lambda x: torch.ops.aten.softmax.int(x, -1),
    "log_softmax": lambda x: torch.ops.aten.log_softmax.int(x, -1),
    "floor_divide": lambda x: torch.ops.aten.floor_divide(x, torch.ones(())),
    "true_divide": lambda x: torch.ops.aten.true_divide(x, torch.ones(())),
    "divide": lambda x: torch.ops.aten.divide(x, torch.ones(())),
    "multiply": lambda x: torch.ops.aten.multiply(x, torch.ones(())),
    "subtract": lambda x: torch.ops.aten.subtract(x, torch.zeros(())),
    "where": lambda x: torch.ops.aten.where.ScalarOther(torch.ones(4, 4, dtype=torch.bool), x, 0),
    "diff": lambda x: torch.ops.aten.diff(x, 0),
    "one_hot": lambda x: torch.ops.aten.one_hot(x.long(), 8),
    "square": lambda x: torch.ops.aten.square(x),
    "argsort": lambda x: torch.ops.aten.argsort(x),
    "__and__": lambda x: torch.ops.aten.__and__.Tensor(x.long(), x.long()),
    "__or__": lambda x: torch.ops.aten.__or__.Tensor(x.long(), x.long()),
    "__xor__": lambda x: torch.ops.aten.__xor__.Tensor(x.long(), x.long()),
    "greater": lambda x: torch.ops.aten.greater.Scalar(x, 0),
    "greater_equal": lambda x: torch.ops.aten.greater_equal.Scalar(x, 0),
    "less": lambda x: torch.ops.aten.less.Scalar(x, 0),
    "less_equal": lambda x: torch.ops.aten.less_equal.Scalar(x, 0),
    "not_equal": lambda x: torch.ops.aten.not_equal.Scalar(x, 0),
    "layer_norm": lambda x: torch.ops.aten.layer_norm(x, [4]),
    "rms_norm": lambda x: torch.ops.aten.rms_norm(x, [4]),
    "group_norm": lambda x: torch.ops.aten.group_norm(x, 1),
    "scaled_dot_product_attention": lambda x: torch.ops.aten.scaled_dot_product_attention(x, x, x),
    "cross_entropy_loss": lambda x: torch.ops.aten.cross_entropy_loss(x, x),
    "nll_loss": lambda x: torch.ops.aten.nll_loss(x, torch.zeros(4, dtype=torch.long)),
}


@pytest.mark.parametrize("name", sorted(FRESH_COMPOSITES))
def test_composites_that_count_as_fresh_are_fresh(name: str) -> None:
    x = torch.rand(4, 4)
    out = PROBES[name](x)
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_memory_from_outside_is_one_set() -> None:
    graph = parse_graph("""graph @a(%x: f32[4], %y: f32[4]) -> f32[4] {
      %v = torch.call @aten.view.default(%y, [4]) : f32[4]
      %f = torch.call @aten.neg.default(%v) : f32[4]
      %c = torch.get_attr {name = "c"} : f32[4]
      %w = torch.call @aten.view.default(%f, [4]) : f32[4]
      return %w
    }""")
    aliases = AliasSets(graph)
    for op in graph.ops:
        aliases.add(op)
    values: dict[str, Value] = {r.name: r for op in graph.ops for r in op.results}
    outside = {n for n, v in values.items() if aliases.is_outside(v)}
    assert outside == {"v", "c"}
    assert {v.name for v in aliases.of(values["f"])} == {"f", "w"}


@pytest.mark.parametrize(
    ("target", "twin"),
    [
        ("aten.div_.Tensor", "aten.div.Tensor"),
        ("aten.scatter_.value", "aten.scatter.value"),
        ("aten.index_put_.default", "aten.index_put.default"),
        ("aten.clamp_.Tensor", "aten.clamp.Tensor"),
        ("aten.copy_.default", "aten.copy.default"),
        ("aten.transpose_.default", None),
        ("aten.squeeze_.dim", None),
        ("aten.set_.source_Tensor", None),
        ("aten.bernoulli_.float", None),
        ("aten.__iadd__.Tensor", None),
    ],
)
def test_functional_twins(target: str, twin: str | None) -> None:
    assert functional_twin(target) == twin


def test_gradients_are_those_of_the_in_place_program() -> None:
    graph = parse_graph("""graph @g(%x: f32[3, 4], %w: f32[3, 1]) -> f32[3, 4] {
      %e = torch.call @aten.exp.default(%x) : f32[3, 4]
      %z = torch.call @aten.zeros_like.default(%e) : f32[3, 4]
      %c = torch.call @aten.copy_.default(%z, %e) : f32[3, 4]
      %m = torch.call @aten.mul_.Tensor(%z, %w) : f32[3, 4]
      %k = torch.call @aten.clamp_.default(%m, 0.1, 2.0) : f32[3, 4]
      return %z
    }""")
    after = PassManager("functionalize").run(graph.clone())
    assert not any(written_operands(op) for op in after.ops)
    grads = []
    for g in (graph, after):
        x = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
        w = torch.tensor([[0.5], [-1.0], [2.0]], requires_grad=True)
        out = run_graph(g, [x, w])[0]
        grads.append(torch.autograd.grad(out.square().sum(), (x, w)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- generated programs -------------------------------------------------------------------------------------------

FRESH = [
    "neg.default(%{a})",
    "add.Tensor(%{a}, %{b})",
    "relu.default(%{a})",
    "mul.Scalar(%{a}, 2)",
    "clone.default(%{a})",
]
VIEWS = [
    "alias.default(%{a})",
    "view.default(%{a}, [-1, 4])",
    "transpose.int(%{a}, 0, 1)",
    "slice.Tensor(%{a}, 0, 0, 9223372036854775807)",
    "to.dtype(%{a}, f32)",
    "type_as.default(%{a}, %{b})",
    "contiguous.default(%{a})",
    "t.default(%{a})",
    "expand.default(%{a}, [4, 4])",
]
WRITES = [
    "add_.Tensor(%{a}, %{b})",
    "mul_.Scalar(%{a}, 3)",
    "copy_.default(%{a}, %{b})",
    "zero_.default(%{a})",
    "clamp_.default(%{a}, -1, 1)",
]


@st.composite
def programs(draw: st.DrawFn) -> str:
    """Straight-line programs over 4 × 4 matrices that mix new memory, views of it, and writes to either."""
    names = ["x", "y"]
    lines = []
    for i in range(draw(st.integers(1, 9))):
        template = draw(st.sampled_from(draw(st.sampled_from([FRESH, VIEWS, WRITES]))))
        recent = names[-4:] + names[:2]
        call = template.format(a=draw(st.sampled_from(recent)), b=draw(st.sampled_from(recent)))
        lines.append(f"  %v{i} = torch.call @aten.{call} : f32[4, 4]")
        names.append(f"v{i}")
    outs = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3))
    types = ", ".join(["f32[4, 4]"] * len(outs))
    body = "\n".join(lines)
    returned = ", ".join("%" + n for n in outs)
    return f"graph @p(%x: f32[4, 4], %y: f32[4, 4]) -> ({types}) {{\n{body}\n  return {returned}\n}}"


def runs(text: str) -> bool:
    """False for programs that torch itself refuses: a view of a transpose, a write through overlapping memory."""
    try:
        run_graph(parse_graph(text), [torch.randn(4, 4), torch.randn(4, 4)])
    except RuntimeError:
        return False
    return True


@given(programs())
@settings(max_examples=150, deadline=None)
def test_functionalize_and_cleanup_keep_what_a_program_does(text: str) -> None:
    if not runs(text):
        return
    assert_preserves(text, CLEANUP, dims="*=4", seeds=(0,))
    assert_outputs_share_as_before(text)


def assert_outputs_share_as_before(text: str) -> None:
    """Outputs that were apart in memory stay apart: a caller may write to one of them."""
    before, after = parse_graph(text), PassManager(CLEANUP).run(parse_graph(text))
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    outs = [run_graph(g, [x.clone(), y.clone()]) for g in (before, after)]
    shares = [[a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a in o for b in o] for o in outs]
    assert shares[0] == shares[1]


@given(programs())
@settings(max_examples=80, deadline=None)
def test_cleanup_is_idempotent_and_valid_after_each_pass(text: str) -> None:
    once = PassManager(CLEANUP, verify=True).run(parse_graph(text))  # verifies after each pass
    verify(once)
    ctx = PassContext()
    again = PassManager("cleanup").run(parse_graph(str(once)), ctx)
    assert str(again) == str(once)
    assert not [r for r in ctx.remarks if r.kind == "applied"]


@given(programs(), st.integers(0, 8))
@settings(max_examples=80, deadline=None)
def test_every_amount_of_fuel_gives_a_right_program(text: str, fuel: int) -> None:
    if not runs(text):
        return
    before = parse_graph(text)
    after = PassManager(CLEANUP, fuel=fuel).run(before.clone())
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    want, got = (run_graph(g, [x.clone(), y.clone()]) for g in (before, after))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize(
    ("call", "pure"),
    [
        ("@aten.scaled_dot_product_attention.default(%x, %y, %x)", True),
        ("@aten.scaled_dot_product_attention.default(%x, %y, %x, none, 0.0, true)", True),
        ("@aten.scaled_dot_product_attention.default(%x, %y, %x, none, 0.1)", False),
        ("@aten.scaled_dot_product_attention.default(%x, %y, %x, dropout_p = 0.1)", False),
        ("@aten.dropout.default(%x, 0.0, true)", False),
    ],
)
def test_attention_draws_numbers_where_it_drops_out(call: str, pure: bool) -> None:
    assert is_pure(one_op(call).ops[0]) is pure
