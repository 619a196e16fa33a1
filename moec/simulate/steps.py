"""What ranks do and what they send each other: the simulator's input, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from moec.simulate.network import Network


@dataclass(frozen=True)
class Compute:
    """An op of a rank.

    Attributes:
        label: What it is.
        seconds: Of its compute stream, with all units.
        beside: The same while a collective of this rank is under way; None for as many.
    """

    label: str
    seconds: float
    beside: float | None = None


@dataclass(frozen=True)
class Start:
    """This rank's part of a collective begins, once its stream is free.

    Attributes:
        collective: Which.
        after: Collectives of this rank that bring what it sends; its stream waits for them, the ops do not.
    """

    collective: int
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Wait:
    """The ops behind it need what the collective brings."""

    collective: int


Step = Compute | Start | Wait


@dataclass(frozen=True)
class Flow:
    """One message.

    Attributes:
        source, to: Ranks.
        bytes: How long.
        hops: Latencies before its last byte can follow its first, as a ring hands messages on.
    """

    source: int
    to: int
    bytes: float
    hops: int = 1


@dataclass(frozen=True)
class Collective:
    """Messages that belong together.

    Attributes:
        label: What it carries.
        group: Name of the group; its stream.
        ranks: Who takes part.
        flows: Its messages.
        sent: Bytes that each rank sends to others as its program sees it, whatever way they take.
    """

    label: str
    group: str
    ranks: tuple[int, ...]
    flows: tuple[Flow, ...]
    sent: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """What a stream did between two moments, in seconds. ``kind`` is ``compute``, ``comm`` or ``wait``."""

    rank: int
    stream: str
    kind: str
    label: str
    begin: float
    end: float


@dataclass
class Timeline:
    """What happened.

    Attributes:
        seconds: When the last rank was done.
        ends: When every rank was.
        spans: What every stream did, in order of their beginnings.
        network: The links' own account.
    """

    seconds: float
    ends: list[float]
    spans: list[Span]
    network: Network

    def total(self, rank: int, kind: str) -> float:
        """Seconds that a rank spent in spans of a kind."""
        return sum(s.end - s.begin for s in self.spans if s.rank == rank and s.kind == kind)
