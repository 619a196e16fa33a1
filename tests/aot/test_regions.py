"""Layers that are alike become calls of one op; the program computes the same bits, and layers that differ stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from moec.aot.generation import DECODE, PREFILL, export_pair
from moec.aot.region import Region
from moec.aot.regions import FEWEST, share_layers
from moec.aot.source import Source, Tokens, export, for_experts
from moec.exported import optimize
from tests.support import models


class Layer(nn.Module):
    def __init__(self, width: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).relu() * self.scale


class Writing(Layer):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.inner(x))


class Overwriting(Layer):
    """Writes into its input, and gives something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x.add_(self.inner(x))
        return x.relu()


class Viewing(Layer):
    """Gives a view of its input besides."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)


class Splitting(Layer):
    """Gives a part of its input, which a tuple of views holds."""

    def forward(self, x: Tensor) -> Tensor:
        return x.split([8, 0], -1)[0]


class Unlike(Layer):
    """Takes a path of its own in every layer."""

    def __init__(self, number: int) -> None:
        super().__init__(scale=float(number))


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        for layer in self.layers:
            x = layer(x)
        return x.sum(-1)


def exported(module: nn.Module, dynamic: bool = True) -> tuple[ExportedProgram, Tensor]:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    shapes = {"x": {0: Dim("batch", min=1, max=16), 1: Dim("seq", min=1, max=16)}} if dynamic else None
    with torch.no_grad():
        return torch.export.export(module.eval(), (x,), dynamic_shapes=shapes, strict=False), x


class Interpreter(torch.fx.Interpreter):
    """Runs the regions' own graphs where their ops are called."""

    def __init__(self, program: ExportedProgram, shared: list[tuple[Region, Any]]) -> None:
        super().__init__(program.graph_module)
        self.modules = {op: region.module for region, op in shared}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.modules:
            made = self.modules[target](*args)
            return made[0] if len(made) == 1 else made
        return super().call_function(target, args, kwargs)


def run(program: ExportedProgram, shared: list[tuple[Region, Any]], *inputs: Tensor) -> Any:
    given = [
        program.state_dict.get(s.target, program.constants.get(s.target)) for s in program.graph_signature.input_specs
    ]
    user = iter(inputs)
    with torch.no_grad():
        return Interpreter(program, shared).run(*(next(user) if g is None else g for g in given))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_layers_of_families_share_one_op(name: str) -> None:
    model = Tokens(for_experts(models.build(name, layers=4))).eval()
    source = Source(name, model, (models.inputs(name, 2, 12)["input_ids"],))
    program = optimize(export(source, {"batch": (1, 8), "seq": (1, 64)}), passes="functionalize,canonicalize,cse")
    cases = [models.inputs(name, b, s, seed=b)["input_ids"] for b, s in ((2, 12), (3, 40))]
    want = [run(program, [], c)[0] for c in cases]
    before = len(program.graph.nodes)
    shared = share_layers(program)
    ((_, op),) = shared
    # Without the passes that raise blocks, the first layer may hold what they take out of all.
    assert len(program.graph.find_nodes(op="call_function", target=op)) >= 3
    assert len(program.graph.nodes) < before / 2
    for case, logits in zip(cases, want, strict=True):
        torch.testing.assert_close(run(program, shared, case)[0], logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_layers_that_fill_a_cache_share_one_op_in_each_entry(name: str) -> None:
    model = Tokens(for_experts(models.build(name, layers=4))).eval()
    source = Source(name, model, (models.inputs(name, 2, 12)["input_ids"],))
    programs, _ = export_pair(source, {"batch": (1, 4), "seq": (1, 16)})
    for entry, tokens in ((PREFILL, 5), (DECODE, 1)):
        program = optimize(programs[entry], passes="functionalize,canonicalize,cse")
        held = [n.meta["val"] for n in program.graph.find_nodes(op="placeholder") if n.name.startswith("caches")]
        start = [torch.randn(3, *c.shape[1:], generator=torch.Generator().manual_seed(0)) for c in held]
        caches, want_caches = ([c.clone() for c in start] for _ in range(2))
        ids, position, padding = models.inputs(name, 3, tokens)["input_ids"], torch.tensor(2), torch.tensor([0, 1, 2])
        want = run(program, [], ids, position, *want_caches, padding)[0]
        ((_, op),) = shared = share_layers(program)
        assert len(program.graph.find_nodes(op="call_function", target=op)) >= 3
        got = run(program, shared, ids, position, *caches, padding)[0]
        torch.testing.assert_close([got, *caches], [want, *want_caches], rtol=0, atol=0)
        assert not any(map(torch.equal, caches, start))


def test_sizes_of_results_follow_from_the_arguments() -> None:
    program, _ = exported(Stack([Layer() for _ in range(FEWEST)]))
    ((region, op),) = share_layers(program)
    given = [torch.empty(n.meta["val"].shape if n.meta["val"].dim() < 3 else (7, 2, 8)) for n in region.arguments]
    made = region.fake(*given)
    assert isinstance(made, Tensor) and made.shape == (7, 2, 8)
    again, _ = exported(Stack([Layer() for _ in range(FEWEST + 1)]))
    assert share_layers(again)[0][1] is op  # the name depends on the content, not on how often it is there


def test_two_kinds_of_layers_are_two_ops() -> None:
    program, x = exported(Stack([Layer(scale=1.0 + i % 2) for i in range(2 * FEWEST)]))
    want = run(program, [], x)
    shared = share_layers(program)
    assert [len(program.graph.find_nodes(op="call_function", target=op)) for _, op in shared] == [FEWEST, FEWEST]
    torch.testing.assert_close(run(program, shared, x), want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [Layer() for _ in range(FEWEST - 1)],
        lambda: [Unlike(i) for i in range(FEWEST)],
        lambda: [Writing() for _ in range(FEWEST)],
        lambda: [Overwriting() for _ in range(FEWEST)],
        lambda: [Viewing() for _ in range(FEWEST)],
        lambda: [Splitting() for _ in range(FEWEST)],
    ],
    ids=["few", "unlike", "writing", "overwriting", "views", "parts"],
)
def test_what_stays(layers: Callable[[], list[nn.Module]]) -> None:
    program, _ = exported(Stack(layers()))
    before = str(program.graph)
    assert not share_layers(program)
    assert str(program.graph) == before
