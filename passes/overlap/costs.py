"""What planning asks of a cost model and of a routing profile. Passes know neither; they know these shapes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from moec.ir.core import Op


class Transport(Protocol):
    """Links between the ranks of a group (``moec.cost.links.Link``)."""

    def seconds(self, bytes: float, messages: int = 1) -> float:
        """Time of ``bytes`` of the busiest rank, in ``messages`` collectives one after the other."""


class ExpertTimes(Protocol):
    """A rank's experts (``moec.cost.curve.LayerCurve``)."""

    def seconds(self, loads: Iterable[float]) -> float:
        """Time of one call whose experts have ``loads`` rows; 0.0 without any row."""


def burden_seconds(burden: Transport | None, links: Transport, bytes: float, messages: int = 1) -> float:
    """What collectives take of the experts beside them: no more than the time for which they travel.

    Threads that send work while rows are on their way, so what they take of one thread's core ends with it; and what
    the thread that computes copies is part of the time that was measured of the links.
    """
    return min(burden.seconds(bytes, messages), links.seconds(bytes, messages)) if burden is not None else 0.0


@runtime_checkable
class OverlapCosts(Protocol):
    """What ``ctx.cost_model`` must answer for schedules to be chosen."""

    def expert_times(self, op: Op, backward: bool = False) -> ExpertTimes | None:
        """Of the experts of one rank of a ``moe.parallel_experts``; None where the model does not know them."""

    def transport(self, group: str, ranks: int) -> Transport | None:
        """Of the links of a group; None where nobody said what they are."""

    def copying(self, group: str, bytes: float) -> float:
        """Time in which a rank of a group copies ``bytes`` from one place of its memory to another."""

    def chunk_seconds(self, op: Op, place: int, along: str) -> float:
        """Time of a rank's processor that a chunk costs beside its rows and its experts: calls of its ops.

        Args:
            op: A ``moe.parallel_experts``.
            place: 0 for its forward, 1 for its backward.
            along: What is cut, ``"experts"`` or ``"tokens"``.
        """

    def burden(self, group: str) -> Transport | None:
        """What a collective takes of the processor whose experts run meanwhile; None where it takes nothing."""


@runtime_checkable
class FrontCosts(Protocol):
    """What ``ctx.cost_model`` may answer besides."""

    def front_seconds(self, op: Op, place: int, along: str) -> float:
        """Of ``chunk_seconds``, those before the first chunk's experts: all chunks' rows leave before. Else 0."""


@runtime_checkable
class GradientCosts(Protocol):
    """What ``ctx.cost_model`` may answer besides."""

    def in_place(self, op: Op) -> bool:
        """Whether chunks of a ``moe.parallel_experts`` write gradients of weights where they belong.

        Where nobody says so, they are copied together.
        """


@runtime_checkable
class RoutingLoads(Protocol):
    """What ``ctx.profile`` must answer."""

    def rows(self, module: str, ranks: int, experts: int) -> Sequence[Sequence[float]] | None:
        """Rows of a step that every rank sends to every expert, [N][E], for a layer by its module's path."""


@runtime_checkable
class RoutingReach(Protocol):
    """What ``ctx.profile`` may answer besides."""

    def reach(self, module: str, sizes: Sequence[int], nodes: int) -> Sequence[Sequence[float]] | None:
        """Tokens of every rank that have experts on every node, [N][G]; where nobody says so, they are expected.

        Args:
            module: Path of the layer's module.
            sizes: Experts of every rank.
            nodes: G; each has N / G neighbouring ranks.
        """
