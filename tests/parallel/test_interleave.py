"""Two micro-batches through the same spread layers: any graph keeps its dependencies, two real ranks their bits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moec
from moec.ir.beside import makers
from moec.ir.core import Graph, Op, Value
from moec.ir.types import TensorType, TokenType, dtype
from moec.passes.interleave_layers.interleave import schedule
from moec.runtime import unshard  # noqa: F401  (registers torch.ops.moec.unshard)
from tests.support.gloo import on_gloo
from tests.support.processes import run_processes

RANKS, EXPERTS, HIDDEN, INNER, TOKENS = 2, 4, 16, 32, 12
DEADLINE = 200.0
WHOLE = "default,expert-parallel"
DUAL = f"{WHOLE},overlap{{chunks=2}},interleave-layers"


def random_graph(rng: random.Random) -> Graph:
    graph, t = Graph("any"), TensorType(dtype("f32"), ())
    values: list[Value] = [graph.add_arg(t, "x")]
    tokens: list[Value] = []
    for _ in range(rng.randint(1, 20)):
        if tokens and rng.random() < 0.4:
            token = tokens.pop(rng.randrange(len(tokens)))
            ends = rng.random() < 0.5
            op = graph.append(Op("moe.resume", [token], [t if ends else TokenType()], groups=(1,)))
        else:
            name = rng.choice(("moe.begin", "torch.call"))
            operands = rng.choices(values, k=rng.randint(1, 3))
            types = [TokenType() if name == "moe.begin" else t]
            groups = (len(operands),)
            op = graph.append(Op(name, operands, types, attrs={"target": "aten.cat.default"}, groups=groups))
        (values if op.result.type == t else tokens).append(op.result)
    graph.append(Op("return", values[-2:], groups=(len(values[-2:]),)))
    return graph


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9))
def test_a_schedule_keeps_every_dependency_and_waits_only_where_nothing_else_is_ready(seed: int) -> None:
    graph = random_graph(random.Random(seed))
    ops = list(graph.ops)
    order = schedule(graph)
    assert len(order) == len(ops) and set(order) == set(ops) and order[-1] is graph.terminator
    place = {op: i for i, op in enumerate(order)}
    assert all(place[maker] < place[op] for op in ops for maker in makers(op))
    assert [op.name for op in order] == [op.name for op in schedule(graph)], "the graph alone decides"
    for i, op in enumerate(order):
        if op.name == "moe.resume":
            done = set(order[:i])
            later = [o for o in order[i:-1] if o.name != "moe.resume"]
            assert not any(makers(o) <= done for o in later), "it waits although something else is ready"


class Two(nn.Module):
    """Two halves of the tokens, one after the other through ``attention`` and experts that lie on two ranks."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        made = {n: torch.randn(s, generator=gen) * 0.3 for n, s in self.shapes().items()}
        mine = slice(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
        for name, value in made.items():
            setattr(self, name, nn.Parameter(value[mine].clone() if value.dim() == 3 else value))

    @staticmethod
    def shapes() -> dict[str, tuple[int, ...]]:
        return {
            "q": (HIDDEN, HIDDEN), "router": (EXPERTS, HIDDEN), "up": (EXPERTS, INNER, HIDDEN),
            "down": (EXPERTS, HIDDEN, INNER),
        }  # fmt: skip

    def layer(self, x: Tensor) -> Tensor:
        x = x + torch.softmax(x @ self.q @ x.T, -1) @ x
        weights, ids = (x @ self.router.T).softmax(-1).topk(2, -1)
        sizes = [EXPERTS // RANKS] * RANKS
        up, down = (torch.ops.moec.unshard.default(w, sizes, "ep", 1.0) for w in (self.up, self.down))
        rows, flat = x.repeat_interleave(2, dim=0), ids.reshape(-1)
        inner = torch.relu(torch.bmm(up[flat], rows.unsqueeze(-1)).squeeze(-1))
        out = torch.bmm(down[flat], inner.unsqueeze(-1)).squeeze(-1)
        return x + (out * weights.reshape(-1, 1)).view(-1, 2, HIDDEN).sum(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x[: TOKENS // 2], x[TOKENS // 2 :]
        for _ in range(2):
            first, second = self.layer(first), self.layer(second)
        return torch.cat([first, second])


def main(rank: int, folder: str) -> None:
    on_gloo(rank, folder, RANKS, lambda: programs(rank))


def programs(rank: int) -> dict[str, Any]:
    from moec.backends.distributed import groups
    from moec.runtime import staged

    groups.bind("ep", dist.new_group(list(range(RANKS))))
    found: dict[str, Any] = {}
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(rank))
    program = torch.export.export(Two(rank), (x,), strict=False)
    for name, passes in (("whole", WHOLE), ("dual", DUAL)):
        made = moec.optimize(program, passes=passes, backends=("aten",))
        with torch.no_grad():
            found[name] = made.module()(x)
        found[f"{name} calls"] = [n.target.name() for n in made.graph.nodes if "moec" in str(n.target)]
    found["left"] = staged.under_way()
    try:
        made.module()(x)
    except moec.MoecError as error:
        found["trained"] = str(error)
    return found


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo")
def test_two_ranks_have_the_bits_of_one_layer_after_the_other(tmp_path: Path) -> None:
    for found in run_processes(main, RANKS, tmp_path, DEADLINE):
        assert "error" not in found, found["error"]
        assert torch.equal(found["dual"], found["whole"])
        assert found["whole calls"].count("moec::experts") == 4
        layers = [c.removesuffix("_layer") for c in found["dual calls"] if c.endswith("_layer")]
        assert layers[:4] == ["moec::begin", "moec::begin", "moec::resume", "moec::resume"]
        assert layers.count("moec::begin") == layers.count("moec::end") == 4
        assert found["left"] == 0, "every layer that was begun is at its end"
        assert "a layer in pieces has no gradients" in found["trained"]
