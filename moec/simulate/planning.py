"""What passes are given when a simulation runs them: the simulated machine's costs, and the simulated routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from moec.cost.attention import core_seconds
from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.ir.beside import EXPERTS, own_experts
from moec.ir.core import Graph, Op
from moec.ir.opdef import op_def
from moec.ir.parallel_semantics import owners
from moec.op_costs import layer_shape
from moec.passes.overlap.by_experts import cut_by_experts
from moec.passes.overlap.chunks import Chunks, Whole
from moec.passes.overlap.cuts import expert_ranges
from moec.simulate.costs import FLOAT_TYPES, Costs, is_free
from moec.simulate.routing import Routing
from moec.simulate.topology import Topology


@dataclass(frozen=True)
class MachineCosts:
    """Costs on a topology, as passes that plan communication ask for them.

    Attributes:
        topology: The machine, cut to the ranks that take part.
    """

    topology: Topology
    _costs: list[Costs] = field(default_factory=list, compare=False, repr=False)

    def expert_times(self, op: Op, backward: bool = False) -> LayerCurve | None:
        """Times of one rank's experts of a ``moe.parallel_experts``; None where its sizes are not known."""
        inner = own_experts(op.regions[0])
        return self.layer_times(inner[0], op.attrs["group"], backward) if inner else None

    def layer_times(self, op: Op, group: str, backward: bool = False) -> LayerCurve | None:
        """Times of a ``moe.experts`` on a rank; None where its sizes are not known."""
        shape = layer_shape(op)
        return None if shape is None else self._ops.curve_of(shape, backward)

    @property
    def _ops(self) -> Costs:
        """What the simulation itself asks; made once, for its curves."""
        if not self._costs:
            self._costs.append(Costs(self.topology.device))
        return self._costs[0]

    def transport(self, group: str, ranks: int) -> Link | None:
        """What an all-to-all of a group costs by the bytes of its busiest rank, start included.

        Over nodes it is as fast as the NICs let it be: they carry the part of a rank's bytes that leaves its node.
        """
        t = self.topology
        if ranks < 2:
            return None
        across = t.nodes > 1 and t.between is not None and not group.endswith(".local")
        if not across:
            return Link(t.device.start_s + t.inside.alpha_s, t.inside.bytes_per_s)
        assert t.between is not None
        neighbours = 0 if group.endswith(".node") else t.per_node - 1
        leaving = (ranks - 1 - neighbours) / (ranks - 1)
        speed = t.between.bytes_per_s / leaving
        if neighbours:
            speed = min(speed, t.inside.bytes_per_s * (ranks - 1) / neighbours)
        return Link(t.device.start_s + t.between.alpha_s, speed)

    def copying(self, group: str, bytes: float) -> float:
        """Time in which a rank copies ``bytes`` in its memory: it reads them and writes them."""
        device = self.topology.device
        return device.launch_s + 2 * bytes / device.target.memory_bandwidth

    def chunk_seconds(self, op: Op, place: int, along: str) -> float:
        """Starts of a chunk's ops on the device, those of its experts aside, which their curve has."""
        region = op.regions[place]
        if along == "tokens":
            return self.topology.device.launch_s * _started(region)
        sizes = op_def(op.name).attr(op, "sizes")
        try:
            one, more = (cut_by_experts(region, Chunks(sizes, expert_ranges(sizes, n))) for n in (1, 2))
        except Whole:
            return 0.0  # nor will it be cut
        return self.topology.device.launch_s * (_started(more) - _started(one))

    def dense_seconds(self, group: str, rows: float, inputs: float, outputs: float, dtype: str) -> float | None:
        """Time of a product of ``rows`` tokens with a matrix; None for a type that is not known."""
        known = FLOAT_TYPES.get(dtype)
        return None if known is None else self._ops.product(rows, inputs, outputs, known)

    def core_seconds(self, group: str, flops: float, bytes: float, dtype: str, backward: bool) -> float:
        """Time of attention between its projections, of which the forward has so many operations."""
        device = self.topology.device
        return device.launch_s + core_seconds(flops, bytes, device.target, backward)

    def moved_seconds(self, group: str, bytes: float) -> float:
        """Time of an op that reads and writes so many bytes together."""
        device = self.topology.device
        return device.launch_s + bytes / device.target.memory_bandwidth

    def op_seconds(self, op: Op, group: str, place: int, bytes: float) -> float:
        """Time of an op of a layer's program that is no expert and sends nothing."""
        return 0.0 if is_free(op) else self.moved_seconds(group, bytes)

    def piece_seconds(self, group: str) -> float:
        """What an op of a layer in pieces takes beside what it runs."""
        return self.topology.device.piece_s

    def burden(self, group: str) -> Link | None:
        """What a collective takes of the experts beside it: while it is under way they have fewer units.

        In t seconds beside it, experts do what takes ``(1 - units) t`` without it, so they end ``units t`` later.
        """
        units = self.topology.device.comm_units
        link = self.transport(group, self.topology.ranks)
        return None if link is None or not units else Link(link.alpha_s * units, link.bytes_per_s / units)


def _started(region: Graph) -> int:
    """Ops of a program that start something on the device, beside its experts and its collectives."""
    return sum(not (is_free(op) or op.dialect == "comm" or op.name in EXPERTS) for op in region.ops)


@dataclass(frozen=True)
class RoutedRows:
    """Rows that ranks send to experts in the simulated step; every layer's are those of the first."""

    routing: Routing
    tokens: int
    top_k: int

    def rows(self, module: str, ranks: int, experts: int) -> Sequence[Sequence[float]] | None:
        """[N][E], or None where a token has more choices than there are experts."""
        if self.top_k > experts:
            return None
        ids = [self.routing.ids(r, self.tokens, self.top_k, experts) for r in range(ranks)]
        return [[float(n) for n in torch.bincount(i.flatten(), minlength=experts).tolist()] for i in ids]

    def reach(self, module: str, sizes: Sequence[int], nodes: int) -> Sequence[Sequence[float]] | None:
        """[N][G], tokens of every rank that have experts on every node; None as above."""
        if self.top_k > sum(sizes):
            return None
        each = len(sizes) // nodes
        ids = [self.routing.ids(r, self.tokens, self.top_k, sum(sizes)) for r in range(len(sizes))]
        on = [owners(i, sizes) // each for i in ids]
        return [[float((n == node).any(dim=1).sum()) for node in range(nodes)] for n in on]

    def least_saving(self, experts: int, top_k: int, batches: int, sizes: tuple[int, ...]) -> str:
        """Why no saving is expected of regrouping tokens."""
        return "simulated tokens choose one by one, so nothing shows clusters"
