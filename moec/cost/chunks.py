"""What cutting a layer into chunks costs a rank beside its rows."""

from __future__ import annotations

from dataclasses import dataclass

from moec.cost.links import Link


@dataclass(frozen=True)
class ChunkCosts:
    """Seconds of a rank's processor.

    Attributes:
        forward: Of a chunk of experts, forwards.
        tokens: Of a chunk of tokens, forwards.
        backward: Of a chunk of experts, backwards.
        burden: What a collective takes of the experts beside it; None where threads that send have cores to spare.
    """

    forward: float
    tokens: float
    backward: float
    burden: Link | None

    def of(self, place: int, along: str) -> float:
        """Of a chunk of ``along`` in the forward (place 0) or backward (1)."""
        if place:
            return self.backward
        return self.tokens if along == "tokens" else self.forward
