"""From the graphs of all ranks to what each does: its ops with their times, and what it starts and waits for.

Ranks are coroutines that run their graphs op by op (floats without numbers, integers as they are) and step aside where
a collective that they wait for is not complete. So sizes that depend on the routing are real ones, whatever passes have
made of the program; the order of its steps is the order of the graph's ops, nested programs of expert layers included.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from moec.ir.comm_semantics import running_in
from moec.ir.core import Graph, Op, Value
from moec.ir.opdef import op_def
from moec.ir.staged import stops
from moec.simulate.abstract import argument, execute, known
from moec.simulate.costs import Costs, rows_of_experts
from moec.simulate.errors import SimulationError
from moec.simulate.exchange import Exchange, Groups, Promise, RankWorld
from moec.simulate.routing import Routing
from moec.simulate.steps import Collective, Compute, Start, Step, Wait
from moec.simulate.topology import Topology

Run = Generator[None, None, list[Any]]


@dataclass(frozen=True)
class Trace:
    """What all ranks do.

    Attributes:
        programs: Steps of every rank.
        collectives: What their starts and waits speak of.
        sent: Bytes that every rank's program sends to others, by (kind, group).
        rows: Rows that every rank's experts compute, all layers together.
    """

    programs: list[list[Step]]
    collectives: list[Collective]
    sent: list[dict[tuple[str, str], int]]
    rows: list[int]


class _Part:
    """A graph that is run, and how far."""

    def __init__(self, graph: Graph, inputs: Sequence[Any]) -> None:
        self.graph, self.at = graph, 0
        self.last: dict[Value, int] = {v: i for i, op in enumerate(graph.ops) for v in op.operands}
        self.env: dict[Value, Any] = dict(zip(graph.args, inputs, strict=True))


class _Rank:
    """One rank's way through its graph."""

    def __init__(self, me: int, world: RankWorld, costs: Costs, routing: Routing, symbols: Mapping[Any, int]) -> None:
        self.me, self.world, self.costs, self.routing, self.symbols = me, world, costs, routing, symbols
        self.steps: list[Step] = []
        self.rows = self.layers = 0
        self.spread: list[tuple[Op, list[Any], list[Any]]] = []  # layers of the forward, their operands and results

    def main(self, graph: Graph, given: Mapping[int, Any], training: bool) -> Run:
        inputs = [given[i] if i in given else argument(v, self.symbols) for i, v in enumerate(graph.args)]
        outputs = yield from self.graph(graph, inputs)
        for op, values, results in reversed(self.spread if training else []):
            yield from self.graph(op.regions[1], [*results, *values])  # a gradient is as large as its result
        return outputs

    def graph(self, graph: Graph, inputs: Sequence[Any]) -> Run:
        return (yield from self.part(_Part(graph, inputs)))

    def part(self, part: _Part, until: int = -1) -> Run:
        """Run a graph on from where it was left, up to a place or to its end."""
        graph, env, last = part.graph, part.env, part.last
        while part.at < len(graph.ops):
            i, op = part.at, graph.ops[part.at]
            if i == until:
                return []
            part.at += 1
            values = [env[v] for v in op.operands]
            if op is graph.terminator:
                return values
            results = yield from self.op(op, values)
            env.update(zip(op.results, results, strict=True))
            for v in op.operands:
                if last[v] == i:
                    env.pop(v, None)
        raise SimulationError(f"graph @{graph.name} does not end in return")

    def on(self, part: _Part) -> Generator[None, None, Any]:
        """Run a layer in pieces on: the same again, left at a later place, or its results."""
        place = next((p for p in stops(part.graph) if p > part.at), -1)
        results = yield from self.part(part, place)
        return part if place >= 0 else results

    def op(self, op: Op, values: list[Any]) -> Run:
        if op.name == "moe.parallel_experts":
            values[1] = self.chosen(op, values)
            results = yield from self.graph(op.regions[0], values)
            self.spread.append((op, values, results))
            return results
        if op.name in ("moe.begin", "moe.resume") and (piece := self.costs.device.piece_s):
            self.steps.append(Compute(op.name, piece))
        if op.name == "moe.begin":
            values[1] = self.chosen(op, values)
            return [(yield from self.on(_Part(op.regions[0], values)))]
        if op.name == "moe.resume":
            found = yield from self.on(values[0])
            return [found] if isinstance(found, _Part) else list(found)
        if op.name == "comm.wait":
            promise = values[0]
            assert isinstance(promise, Promise)
            self.steps.append(Wait(promise.meeting.number))
            while not promise.meeting.complete:
                yield
            return [promise.wait()]
        if op.name in ("moe.experts", "moe.experts_backward"):
            at = 0 if op.name == "moe.experts" else 1
            if not known(values[at + 1]):
                values[at + 1] = self.chosen(op, values, at)
            self.rows += sum(rows_of_experts(values[at + 1], op_def(op.name).attr(op, "experts")))
        with running_in(self.world):
            results = execute(op, values, self.symbols, self.nested)
        if op.name == "moe.route":
            results[1] = self.routed(op, results[1])
        if op.name.startswith("comm."):
            assert isinstance(results[0], Promise)
            self.steps.append(Start(results[0].meeting.number))
        elif seconds := self.costs.seconds(op, values, results):
            name = str(op.attrs.get("target", "")) if op.name == "torch.call" else op.name
            beside = self.costs.beside.seconds(op, values, results) if self.costs.beside else None
            self.steps.append(Compute(name, seconds, beside))
        return results

    def nested(self, graph: Graph, inputs: Sequence[Any]) -> list[Any]:
        """A nested graph that is run in one go, as part of its op."""
        run = self.graph(graph, inputs)
        kept = self.steps
        self.steps = []  # its time is the op's
        try:
            while True:
                next(run)
        except StopIteration as stop:
            return list(stop.value)
        finally:
            self.steps = kept

    def chosen(self, op: Op, values: Sequence[Any], at: int = 0) -> Tensor:
        """The ids of a layer: the program's own where they are known, else as the routing says."""
        ids = values[at + 1]
        if known(ids):
            assert isinstance(ids, Tensor)
            return ids
        experts = op_def(op.name).attr(op, "experts")
        if experts == 1:  # a shared expert: nothing is chosen
            return torch.zeros(tuple(ids.shape), dtype=torch.int64)
        fixed = op.name == "moe.parallel_experts" and op.attrs.get("form") == "fixed"
        groups = len(op.attrs["sizes"]) if fixed else 0
        return self._ids(
            len(ids), ids.shape[1], experts, groups=groups, per_group=ids.shape[1] // groups if groups else 0
        )

    def routed(self, op: Op, ids: Tensor) -> Tensor:
        get, logits = op_def(op.name).attr, op.operands[0].type
        experts = int(logits.shape[1])  # type: ignore[attr-defined]
        names = ("groups", "top_groups", "per_group")
        return self._ids(len(ids), ids.shape[1], experts, **{n: get(op, n) for n in names})

    def _ids(self, tokens: int, top_k: int, experts: int, **groups: int) -> Tensor:
        self.layers += 1
        return self.routing.ids(self.me, tokens, top_k, experts, layer=self.layers - 1, **groups)


def trace(
    graphs: Sequence[Graph],
    groups: Groups,
    topology: Topology,
    routing: Routing,
    *,
    sizes: Sequence[Mapping[str, int]],
    ids: Sequence[Mapping[int, Tensor]] | None = None,
    training: bool = False,
    costs: Costs | None = None,
) -> Trace:
    """Run the graphs of all ranks without numbers.

    Args:
        graphs: One a rank; the same one several times where ranks do the same.
        groups: Names of groups, and the ranks of each instance.
        topology: With as many ranks.
        routing: Which experts tokens choose.
        sizes: Of every rank, what the symbols of its graph's arguments stand for.
        ids: Of every rank, arguments that are given, by their place: chosen experts that were recorded.
        training: Run the layers' backward programs behind the graph, the last layer's first.
        costs: Times of ops, where they are not those of the topology's device.

    Raises:
        SimulationError: A size is missing, or ranks wait for each other without end.
        CommError: Ranks do not agree in a collective.
    """
    exchange, costs = Exchange(topology, groups), costs or Costs(topology.device)
    ranks, runs = [], []
    for me, graph in enumerate(graphs):
        symbols = {sympy.Symbol(name, integer=True): size for name, size in sizes[me].items()}
        rank = _Rank(me, RankWorld(me, exchange), costs, routing, symbols)
        ranks.append(rank)
        runs.append(rank.main(graph, ids[me] if ids is not None else {}, training))
    left = list(range(len(graphs)))
    while left:
        before = [len(r.steps) for r in ranks]
        left = [me for me in left if _goes_on(runs[me])]
        if left and before == [len(r.steps) for r in ranks]:
            raise SimulationError(
                f"ranks {', '.join(map(str, left[:8]))} wait for collectives that others never start",
                hint="all ranks of a group must begin the same collectives in the same order",
            )
    done = [c for c in exchange.collectives if c is not None]
    if len(done) < len(exchange.collectives):
        raise SimulationError("a collective was started by some ranks of its group only")
    return Trace([r.steps for r in ranks], done, exchange.sent[: len(graphs)], [r.rows for r in ranks])


def _goes_on(run: Run) -> bool:
    """Let a rank run until it waits or is done; True if it waits."""
    try:
        next(run)
    except StopIteration:
        return False
    return True
