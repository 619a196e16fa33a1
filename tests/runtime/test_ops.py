"""The runtime ops: schema, fakes, gradients, and every mode and compiler they must run under."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moec.backends import registry
from moec.backends.aten import AtenBackend, ExpertsKernel
from moec.backends.reference import run_graph
from moec.ir.attributes import Operand
from moec.ir.core import Graph, Op
from moec.ir.types import TensorType
from moec.runtime import counters, programs
from moec.runtime.ops import OpError
from tests.backends.cases import TOLERANCE, ExpertsCase, relative_error, route_graph

CASE = ExpertsCase(bias=True)
FORWARD_CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
EXPERTS, ROUTE = torch.ops.moec.experts, torch.ops.moec.route


def key(case: ExpertsCase = CASE, backend: str = "aten") -> str:
    return programs.register(case.graph(), backend, label="layers.0").key


def run(inputs: list[Tensor], program: str) -> Tensor:
    out: Tensor = EXPERTS(*inputs[:3], inputs[3:], program)
    return out


def with_grad(inputs: list[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]


def leaves(inputs: list[Tensor]) -> list[Tensor]:
    return [t for t in inputs if t.requires_grad]


class Layer(torch.nn.Module):
    """A linear layer before and a sum after the experts; ``transposed`` keeps the up weight the other way round."""

    def __init__(self, case: ExpertsCase, transposed: bool = False) -> None:
        super().__init__()
        params = case.inputs(1)[3:]
        if transposed:
            params[0] = params[0].transpose(1, 2).contiguous()
        self.transposed = transposed
        self.params = torch.nn.ParameterList(torch.nn.Parameter(p) for p in params)
        self.before = torch.nn.Linear(case.hidden, case.hidden)
        self.key = key(case)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        params = list(self.params)
        if self.transposed:
            params[0] = params[0].transpose(1, 2)
        out: Tensor = EXPERTS(self.before(x), ids, weights, params, self.key)
        return out + 1


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_experts(grad: bool) -> None:
    inputs = with_grad(CASE.inputs(7)) if grad else CASE.inputs(7)
    torch.library.opcheck(EXPERTS.default, (*inputs[:3], inputs[3:], key()))


def test_opcheck_route() -> None:
    program = programs.register(route_graph(8, k=2, renormalize=True), "aten").key
    torch.library.opcheck(ROUTE.default, ([torch.randn(7, 8, requires_grad=True)], program))


def test_opcheck_backward_ops() -> None:
    inputs = CASE.inputs(7)
    needs = [t.is_floating_point() for t in inputs]
    grad = torch.randn(7, CASE.hidden)
    operands = (grad, *inputs[:3], inputs[3:], needs, key())
    torch.library.opcheck(torch.ops.moec.experts_backward.default, operands, test_utils=FORWARD_CHECKS)
    program = programs.register(route_graph(8, k=2), "aten").key
    args = (torch.randn(7, 2), [torch.randn(7, 8)], [True], program)
    torch.library.opcheck(torch.ops.moec.route_backward.default, args, test_utils=FORWARD_CHECKS)


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_gradients_through_the_op(tokens: int, backend: str) -> None:
    mine, theirs = with_grad(CASE.inputs(tokens)), with_grad(CASE.inputs(tokens))
    run(mine, key(backend=backend)).square().sum().backward()
    run_graph(CASE.graph(), theirs)[0].square().sum().backward()
    for a, b in zip(leaves(mine), leaves(theirs), strict=True):
        assert a.grad is not None
        assert relative_error(a.grad, torch.zeros_like(b) if b.grad is None else b.grad) <= TOLERANCE["f32"]


def test_route_gradients() -> None:
    graph = route_graph(8, k=3, scoring="sigmoid", bias=True, renormalize=True, scale=2.0)
    program = programs.register(graph, "aten").key
    logits, bias, factor = torch.randn(9, 8), torch.randn(8), torch.randn(9, 3)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weights, ids = ROUTE([mine, bias], program)
    assert not ids.requires_grad
    (weights * factor).sum().backward()
    (run_graph(graph, [theirs, bias])[0] * factor).sum().backward()
    assert mine.grad is not None
    assert theirs.grad is not None
    assert relative_error(mine.grad, theirs.grad) <= TOLERANCE["f32"]


def test_only_the_inputs_are_saved() -> None:
    inputs = with_grad(CASE.inputs(9))
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(inputs, key())
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in inputs}
    assert len(saved) == len(inputs)


def test_frozen_weights_get_no_gradient() -> None:
    inputs = CASE.inputs(9)
    inputs[0].requires_grad_()
    run(inputs, key()).sum().backward()
    assert inputs[0].grad is not None
    assert all(t.grad is None for t in inputs[1:])


def test_second_derivative_is_a_clear_error() -> None:
    inputs = with_grad(CASE.inputs(5))
    (grad,) = torch.autograd.grad(run(inputs, key()).square().sum(), [inputs[0]], create_graph=True)
    with pytest.raises(OpError, match="gradients of gradients"):
        grad.sum().backward()


def test_create_graph_alone_is_no_error() -> None:
    inputs = with_grad(CASE.inputs(5))
    found = torch.autograd.grad(run(inputs, key()).sum(), leaves(inputs), create_graph=True)
    want = torch.autograd.grad(run(inputs, key()).sum(), leaves(inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode: Callable[[], Any]) -> None:
    inputs = with_grad(CASE.inputs(9))
    want = run_graph(CASE.graph(), [t.detach() for t in inputs])[0]
    with mode():
        out = run(inputs, key())
    assert not out.requires_grad
    assert relative_error(out, want) <= TOLERANCE["f32"]


def test_autocast_stays_outside() -> None:
    inputs = with_grad(CASE.inputs(9))
    want = run(inputs, key())
    want_grads = torch.autograd.grad(want.square().sum(), leaves(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        out = run(inputs, key())
        grads = torch.autograd.grad(out.square().sum(), leaves(inputs))
    assert out.dtype == torch.float32
    assert torch.equal(out, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))


def test_results_never_alias_inputs() -> None:
    region = Graph("router")
    logits = region.add_arg(TensorType.of("f32", "T", 2))
    ids = Op(
        "torch.call",
        [logits],
        [TensorType.of("i64", "T", 2)],
        attrs={"target": "aten.argsort.default", "args": (Operand(0),)},
    )
    region.append(ids)
    region.append(Op("return", [logits, ids.result], groups=(2,)))
    program = programs.register(route_graph(2, k=2, region=region), "aten").key
    x = torch.randn(3, 2)
    weights, _ = ROUTE([x], program)
    assert torch.equal(weights, x)
    assert weights.data_ptr() != x.data_ptr()


def test_fake_sizes_follow_the_input_without_guards() -> None:
    """The token count is unbacked here: asking anything about it would raise."""
    program, shape_env = key(), ShapeEnv()
    router = programs.register(route_graph(CASE.experts, k=CASE.top_k), "aten").key
    with FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True):
        tokens = shape_env.create_unbacked_symint()
        weights, ids = ROUTE([torch.empty(tokens, CASE.experts)], router)
        out = run([torch.empty(tokens, CASE.hidden), ids, weights, *CASE.inputs(1)[3:]], program)
        assert out.shape[1] == CASE.hidden
        for t in (weights, ids, out):
            assert t.shape[0].node.expr == tokens.node.expr
    assert not shape_env.guards


def test_a_wrong_shape_is_told_while_tracing() -> None:
    inputs = CASE.inputs(9)
    inputs[3] = inputs[3][:, :, :-1].contiguous()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(OpError, match=r"'layers\.0'.*%up must be f32"):
        run(inputs, key())


def test_disagreeing_tokens_are_told_while_tracing() -> None:
    inputs = CASE.inputs(9)
    inputs[1] = inputs[1][:-1]
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(OpError, match="%ids must be"):
        run(inputs, key())


def test_a_missing_operand_is_told_while_tracing() -> None:
    inputs = CASE.inputs(9)[:-1]
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(OpError, match="takes 7 tensors, got 6"):
        run(inputs, key())


def test_training_on_a_backend_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forward(AtenBackend):
        name = "forward_only"
        trainable = False

    registry.all_backends()
    monkeypatch.setitem(registry._BACKENDS, "forward_only", Forward())
    out = run(with_grad(CASE.inputs(5)), key(backend="forward_only"))
    with pytest.raises(OpError, match="'forward_only', which has no gradients"):
        out.sum().backward()


def test_counters_tell_what_ran() -> None:
    inputs = with_grad(CASE.inputs(5))
    program = key()
    run(inputs, program).sum().backward()
    run(inputs, program)
    counts = counters.snapshot()
    assert counts.by_name == {"moec::experts": 2, "moec::experts_backward": 1}
    assert counts.by_label == {"layers.0": counts.by_name}
    counters.reset()
    assert counters.snapshot().by_name == {}


COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("transposed", [False, True])
def test_compiled_training_with_dynamic_tokens(
    compiler: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for all lengths, results and gradients as in eager, weights seen where they lie, forward run once."""
    torch._dynamo.reset()
    seen: list[list[Tensor]] = []
    original = ExpertsKernel.forward

    def spy(self: ExpertsKernel, inputs: list[Tensor]) -> list[Tensor]:
        seen.append(inputs[3:])
        return original(self, inputs)

    monkeypatch.setattr(ExpertsKernel, "forward", spy)
    layer = Layer(CASE, transposed)
    compiled = torch.compile(layer, backend=compiler, dynamic=True, fullgraph=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tokens in (7, 5, 33, 2):
        x, ids, weights, *_ = CASE.inputs(tokens, seed=tokens)
        found = []
        for module in (compiled, layer):
            layer.zero_grad()
            a, b = x.clone().requires_grad_(), weights.clone().requires_grad_()
            counters.reset()
            out = module(a, ids, b)
            out.square().sum().backward()
            assert counters.snapshot().by_name == {"moec::experts": 1, "moec::experts_backward": 1}
            found.append([out, a.grad, b.grad, *(p.grad for p in layer.parameters())])
            assert [t.data_ptr() for t in seen.pop()] == [p.data_ptr() for p in layer.params]
        for mine, eager in zip(*found, strict=True):
            assert relative_error(mine, eager) <= TOLERANCE["f32"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_inference(compiler: str) -> None:
    torch._dynamo.reset()
    layer = Layer(CASE)
    compiled = torch.compile(layer, backend=compiler, dynamic=True, fullgraph=True)
    x, ids, weights, *_ = CASE.inputs(9)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert relative_error(compiled(x, ids, weights), layer(x, ids, weights)) <= TOLERANCE["f32"]
