"""Graphs as Dynamo and AOTAutograd hand them over, with higher-order ops and their nested graphs, there and back.

Every graph that one compile makes (torch-level, ATen forward, ATen backward) goes through the IR and is then run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

from moec.capture import graph_from_fx
from moec.emit import graph_to_fx
from moec.ir.core import Graph
from moec.ir.parser import parse_graph
from moec.ir.printer import print_graph
from tests.capture.same import assert_same
from tests.support.models import build, inputs


class Recorder:
    """A Dynamo backend that sends every graph through the IR, checks it, and runs what came back."""

    def __init__(self) -> None:
        self.graphs: dict[str, list[Graph]] = {"dynamo": [], "forward": [], "backward": []}

    def through(self, kind: str, gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
        graph = graph_from_fx(gm)
        back = graph_to_fx(graph, value_key="example_value" if kind == "dynamo" else "val")
        assert_same(gm, back)
        text = print_graph(graph)
        assert print_graph(parse_graph(text)) == text
        self.graphs[kind].append(graph)
        return back

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def compiler(kind: str) -> Callable[..., Any]:
            return lambda g, _: make_boxed_func(self.through(kind, g).forward)

        backend = aot_autograd(
            fw_compiler=compiler("forward"), bw_compiler=compiler("backward"), keep_inference_input_mutations=True
        )
        compiled: Callable[..., Any] = backend(self.through("dynamo", gm), example_inputs)
        return compiled

    def calls(self, kind: str) -> list[str]:
        ops = [op for graph in self.graphs[kind] for op in graph.walk()]
        return [op.attrs["target"] for op in ops if "target" in op.attrs]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def check(fn: Callable[..., Any], *args: Any, **options: Any) -> Recorder:
    """Compile ``fn``, compare outputs and gradients with eager bit by bit, and give back what was recorded."""
    recorder = Recorder()
    compiled = torch.compile(fn, backend=recorder, fullgraph=True, **options)
    results = []
    for f in (fn, compiled):
        leaves = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
        torch.manual_seed(0)
        out = f(*leaves)
        if isinstance(out, torch.Tensor):
            out = (out,)
        if any(a.requires_grad for a in leaves):
            sum(o.sum() for o in out).backward()
        results.append([*out, *leaves, *(a.grad for a in leaves)])
    for want, got in zip(*results, strict=True):
        assert torch.equal(want, got) if isinstance(want, torch.Tensor) else want == got
    return recorder


def rows(grad: bool = True) -> torch.Tensor:
    return torch.rand(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(grad)


def test_activation_checkpointing() -> None:
    weight = torch.nn.Parameter(torch.eye(8) * 0.5)

    def f(x: torch.Tensor) -> Any:
        return checkpoint(lambda y: (y @ weight).relu().chunk(2)[0], x, use_reentrant=False) * 2

    recorder = check(f, rows())
    (graph,) = recorder.graphs["dynamo"]
    op = next(op for op in graph.ops if op.attrs.get("target") == "hop.tag_activation_checkpoint")
    assert len(op.regions) == 1
    assert len(op.regions[0].args) == len(op.operands)
    assert recorder.graphs["backward"]


def test_nested_compile_regions_share_one_module() -> None:
    @torch.compiler.nested_compile_region
    def layer(x: torch.Tensor) -> torch.Tensor:
        return (x * 0.5).sin()

    recorder = check(lambda x: layer(layer(layer(x))), rows())
    (graph,) = recorder.graphs["dynamo"]
    calls = [op for op in graph.ops if op.attrs.get("target") == "hop.invoke_subgraph"]
    assert len(calls) == 3
    assert len({id(op.regions[0]) for op in calls}) == 3  # each its own region ...
    modules = [m for m in graph_to_fx(graph).children() if isinstance(m, torch.fx.GraphModule)]
    assert len(modules) == 1  # ... and one module again


def test_branches() -> None:
    recorder = check(lambda x: torch.cond(x.sum() > 0, lambda y: (y.sin(),), lambda y: (y.cos(),), (x,)), rows())
    (graph,) = recorder.graphs["forward"]
    assert next(len(op.regions) for op in graph.ops if op.attrs.get("target") == "hop.cond") == 2


def test_loops() -> None:
    def f(x: torch.Tensor) -> Any:
        carry, ys = scan(lambda c, a: (c + a, c * a), x[0].clone(), x)
        _, z = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (torch.tensor(0), x))
        return carry, ys, z

    assert {"hop.scan", "hop.while_loop"} <= set(check(f, rows(grad=False)).calls("forward"))


def test_autocast_and_no_grad() -> None:
    weight = torch.eye(8) * 0.5

    def f(x: torch.Tensor) -> Any:
        with torch.no_grad():
            y = x * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = x @ weight
        return y + z.float()

    calls = check(f, rows()).calls("dynamo")
    assert calls.count("torch._C._set_grad_enabled") == 2
    assert "torch.amp.autocast_mode._enter_autocast" in calls


def test_autograd_function() -> None:
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * ctx.saved_tensors[0].cos()

    check(lambda x: Sine.apply(x) * 2, rows())


def test_mutation_rng_and_asserts() -> None:
    def f(x: torch.Tensor, cache: torch.Tensor) -> Any:
        cache[1:3, ...] = x[1:3]
        cache[:, None, ..., ::2].mul_(2)
        torch._assert_async(x.sum() != 12345.0)
        _, ids = x.topk(3)
        return ids + 1, torch.nn.functional.dropout(x, 0.5).sum(), None, 3

    recorder = check(f, rows(grad=False), torch.zeros(4, 8))
    assert recorder.calls("forward").count("aten.copy_.default") == 1
    assert "py.torch._assert_async" in recorder.calls("dynamo")  # AOTAutograd drops it


def test_unbacked_sizes_keep_their_checks() -> None:
    def f(x: torch.Tensor, n: torch.Tensor) -> Any:
        k = n.item()
        torch._check(k >= 1)
        torch._check(k <= 4)
        positive = x[x > 0.5]
        return x.narrow(0, 0, k).sum() * positive.shape[0], positive.nonzero()

    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        recorder = check(f, rows(grad=False), torch.tensor(2), dynamic=True)
    checks = [c for c in recorder.calls("forward") if "assert" in c or "sym_constrain" in c]
    assert checks


def test_auto_functionalized() -> None:
    with torch.library._scoped_library("moec_test_capture", "FRAGMENT") as lib:
        lib.define("add_into(Tensor x, Tensor(a!) y, Tensor[] rest) -> Tensor")

        def add_into(x: torch.Tensor, y: torch.Tensor, rest: list[torch.Tensor]) -> torch.Tensor:
            y.add_(x)
            return x.clone()

        lib.impl("add_into", add_into, "CompositeExplicitAutograd")
        lib.impl("add_into", add_into, "Meta")

        def f(x: torch.Tensor) -> Any:
            y = x.clone()
            return torch.ops.moec_test_capture.add_into(x, y, [x]) + y

        assert "hop.auto_functionalized_v2" in check(f, rows(grad=False)).calls("forward")


@pytest.mark.slow
def test_a_training_model_with_checkpointing() -> None:
    model = build("mixtral", train=True, layers=1)
    model.activation_checkpointing_enable({"use_reentrant": False})
    ids = inputs("mixtral", 2, 6)["input_ids"]
    recorder = check(lambda i: model(i).logits.sum(), ids)
    assert "hop.tag_activation_checkpoint" in recorder.calls("dynamo")
    modules = {op.loc.module for graph in recorder.graphs["dynamo"] for op in graph.walk()}
    assert "model.layers.0.mlp.experts" in modules


def test_a_decode_step_with_a_static_cache() -> None:
    from transformers import StaticCache

    model = build("mixtral", layers=1)
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids = inputs("mixtral", 1, 5)["input_ids"]
    recorder = Recorder()

    def step(token: torch.Tensor) -> torch.Tensor:
        return model(token, past_key_values=cache, use_cache=True).logits

    outs = []
    with torch.no_grad():
        for backend in ("aot_eager", recorder):  # eager itself takes another attention mask: last bits differ
            torch._dynamo.reset()
            cache.reset()
            model(ids, past_key_values=cache, use_cache=True)
            compiled = torch.compile(step, backend=backend, fullgraph=True)
            outs.append([compiled(ids[:, :1]), compiled(ids[:, 1:2]), *(layer.keys.clone() for layer in cache.layers)])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert recorder.calls("forward").count("aten.copy_.default") >= 2  # keys and values are written in place
