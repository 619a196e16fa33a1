"""How long the rows of a layer travel in each form of expert parallelism, by closed formulas of latency and bandwidth.

| form | there | back |
|---|---|---|
| flat | counts, rows | rows |
| hierarchical | between nodes counts, ids, rows; inside a node counts, rows | inside a node rows; between nodes rows |
| gather | all-gathers of counts, ids, rows | rows |

Collectives of a form follow each other. Each takes what its busiest rank sends, by the formulas that the counters of a
run are held to (:mod:`moec.parallel.formula`); an all-gather over nodes goes round rings
(:mod:`moec.simulate.collectives`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moec.cost.links import Link
from moec.parallel.formula import layer_bytes
from moec.simulate.planning import MachineCosts
from moec.simulate.topology import Topology

FORMS = ("flat", "hierarchical", "gather")
MESSAGES = {"flat": {"": (2, 1)}, "hierarchical": {".node": (3, 1), ".local": (2, 1)}, "gather": {"": (3, 1)}}
"""By form and group, collectives there and back."""


@dataclass(frozen=True)
class FormTime:
    """What a layer's forward sends in one form.

    Attributes:
        form: Which.
        there_s, back_s: Seconds of the way to the experts, and home.
        between, inside: Bytes that the busiest rank sends over its NIC, and to ranks of its node.
        overlap: What the pass ``overlap`` says of the forward, where it was asked.
    """

    form: str
    there_s: float
    back_s: float
    between: float
    inside: float
    overlap: str = ""

    @property
    def seconds(self) -> float:
        return self.there_s + self.back_s


def form_times(
    topology: Topology, ids: Sequence[Tensor], sizes: Sequence[int], row: int, *, back: int | None = None
) -> list[FormTime]:
    """Every form that the topology has, those with nodes where it has several.

    Args:
        topology: Cut to as many ranks as there are ``ids``.
        ids: The chosen experts of every rank's tokens, int[T, k] each.
        sizes: Experts of every rank.
        row: Bytes of a token's row.
        back: Bytes of an expert's row, if others than ``row``.
    """
    forms = FORMS if topology.nodes > 1 else ("flat", "gather")
    return [_time(topology, ids, sizes, row, row if back is None else back, form) for form in forms]


def _time(topology: Topology, ids: Sequence[Tensor], sizes: Sequence[int], row: int, back: int, form: str) -> FormTime:
    nodes, ranks = topology.nodes, len(ids)
    there = layer_bytes(ids, sizes, row, form, nodes=nodes, back=0)
    whole = layer_bytes(ids, sizes, row, form, nodes=nodes, back=back)
    seconds, most = [0.0, 0.0], {}
    for group, messages in MESSAGES[form].items():
        members = {"": ranks, ".node": nodes, ".local": ranks // nodes}[group]
        gone, all_of = (max(b[group] for b in bytes) for bytes in (there, whole))
        home = max(w[group] - t[group] for w, t in zip(whole, there, strict=True))
        most[group] = float(all_of)
        link = MachineCosts(topology).transport(f"ep{group}", members)
        if link is None:
            continue
        onward = gathering(topology, ranks) if form == "gather" else link
        seconds[0] += onward.seconds(gone, messages[0])
        seconds[1] += link.seconds(home, messages[1])
    if form == "hierarchical":
        return FormTime(form, seconds[0], seconds[1], most[".node"], most[".local"])
    leaving = (ranks - topology.per_node) / (ranks - 1) if ranks > 1 else 0.0
    return FormTime(form, seconds[0], seconds[1], most[""] * leaving, most[""] * (1 - leaving))


def gathering(topology: Topology, ranks: int) -> Link:
    """An all-gather by the bytes that a rank's own part is for all others, start included.

    Inside a node it goes straight. Over nodes there is a ring for each place of a node: a rank's NIC carries one ring's
    part of all that others have, its link to the neighbours the other rings' parts.
    """
    t = topology
    if t.nodes == 1 or t.between is None:
        return Link(t.device.start_s + t.inside.alpha_s, t.inside.bytes_per_s)
    slowest = t.between.bytes_per_s * t.per_node
    if t.per_node > 1:
        slowest = min(slowest, t.inside.bytes_per_s * t.per_node / (t.per_node - 1))
    return Link(t.device.start_s + t.between.alpha_s * (ranks - 1), slowest)
