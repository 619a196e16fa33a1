"""What a simulation says: step time, communication that nothing hides, load and bytes of every rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moec.simulate.steps import Timeline
from moec.simulate.trace import Trace


@dataclass(frozen=True)
class RankReport:
    """One rank.

    Attributes:
        compute_s: Its ops' time.
        exposed_s: Time its ops stood still for communication, other ranks' lateness included.
        comm_s: Time in which any of its collectives was under way.
        hidden: Part of ``comm_s`` in which its ops ran; 1 where there was none.
        rows: Rows that its experts computed.
        sent: Bytes that its program sent to others.
    """

    compute_s: float
    exposed_s: float
    comm_s: float
    hidden: float
    rows: int
    sent: int


@dataclass(frozen=True)
class Report:
    """A step.

    Attributes:
        seconds: Until the last rank is done.
        compute_s, exposed_s: Of the rank that computes longest: its ops, and what the step takes beside them.
        imbalance: Rows of the fullest rank over the mean.
        ranks: Of every rank.
    """

    seconds: float
    compute_s: float
    exposed_s: float
    imbalance: float
    ranks: tuple[RankReport, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_report(trace: Trace, timeline: Timeline) -> Report:
    """Add up a timeline."""
    ranks = []
    for rank in range(len(trace.programs)):
        spans = [s for s in timeline.spans if s.rank == rank]
        compute, exposed = timeline.total(rank, "compute"), timeline.total(rank, "wait")
        comm = union([(s.begin, s.end) for s in spans if s.kind == "comm"])
        busy = comm + compute - union([(s.begin, s.end) for s in spans if s.kind in ("comm", "compute")])
        sent = sum(trace.sent[rank].values())
        ranks.append(RankReport(compute, exposed, comm, max(0.0, busy / comm) if comm else 1.0, trace.rows[rank], sent))
    longest = max((r.compute_s for r in ranks), default=0.0)
    mean = sum(r.rows for r in ranks) / max(1, len(ranks))
    imbalance = max((r.rows for r in ranks), default=0) / mean if mean else 1.0
    return Report(timeline.seconds, longest, timeline.seconds - longest, imbalance, tuple(ranks))


def union(spans: list[tuple[float, float]]) -> float:
    """Length of what spans cover together."""
    total, reach = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reach))
        reach = max(reach, end)
    return total
