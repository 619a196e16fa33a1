"""What cutting a layer into chunks costs a rank beside its rows."""

from __future__ import annotations

from dataclasses import dataclass

from moec.cost.links import Link


@dataclass(frozen=True)
class Calls:
    """Seconds of one chunk's calls.

    Attributes:
        all: Of all of them.
        front: Of those before the first chunk's experts.
    """

    all: float
    front: float = 0.0


@dataclass(frozen=True)
class ChunkCosts:
    """Seconds of a rank's processor.

    Attributes:
        forward: Of a chunk of experts, forwards.
        tokens: Of a chunk of tokens, forwards.
        backward: Of a chunk of experts, backwards.
        burden: What a collective takes of the experts beside it: of its bytes what the thread that computes copies when
            they have come, and all that threads which send do where they have no cores of their own; None where that
            is nothing. What is copied before they leave, a whole layer pays as well.
    """

    forward: Calls
    tokens: Calls
    backward: Calls
    burden: Link | None

    def of(self, place: int, along: str) -> Calls:
        """Of a chunk of ``along`` in the forward (place 0) or backward (1)."""
        if place:
            return self.backward
        return self.tokens if along == "tokens" else self.forward
