"""One row of the table: a family, and what moec does with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from moec.coverage.compare import TOLERANCE

YES, NO, NONE = "yes", "no", "n/a"


@dataclass
class Row:
    """What became of one family's small model. A field is None where the measuring did not get so far.

    Attributes:
        family: Name of the family.
        decorated: Its experts follow transformers' experts interface.
        how: How moec gets at its experts: ``"interface"``, ``"rewritten"`` by ``moec.prepare``, ``"as written"``, or
            ``"refused"``.
        entry: Class of the small model.
        parameters: How many it has.
        routers: Its routers in words.
        experts: Its experts in words.
        found: MoE blocks that the model has.
        recognised: Of these, in moec's report, raised to moe ops.
        fused: Of these, fused, and seen to run on a backend.
        backends: Which backends took them.
        breaks: Graph breaks with moec.
        own_breaks: Graph breaks of ``torch.compile(backend="eager")`` on the same model.
        error: Largest error of a prefill against the untouched eager model.
        training: One step of training: moec's ops ran in the backward, and the gradients are the eager model's.
        decode: One token on a filled cache: moec's ops ran, and the result is the eager model's. ``"n/a"`` where the
            model has no such thing.
        reasons: Why not more, one line each.
        seconds: How long the measuring took.
    """

    family: str
    decorated: bool
    how: str | None = None
    entry: str | None = None
    parameters: int | None = None
    routers: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    found: int | None = None
    recognised: int | None = None
    fused: int | None = None
    backends: list[str] = field(default_factory=list)
    breaks: int | None = None
    own_breaks: int | None = None
    error: float | None = None
    training: str | None = None
    decode: str | None = None
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def all_fused(self) -> bool:
        """Every block is fused."""
        return bool(self.found) and self.fused == self.found

    @property
    def no_extra_breaks(self) -> bool:
        """moec breaks the graph nowhere that PyTorch alone would not."""
        return self.breaks is not None and self.own_breaks is not None and self.breaks <= self.own_breaks

    @property
    def equal(self) -> bool:
        """The prefill is the eager model's."""
        return self.error is not None and self.error <= TOLERANCE

    @property
    def whole(self) -> bool:
        """Nothing is left to wish for."""
        return (
            self.all_fused
            and self.no_extra_breaks
            and self.equal
            and self.training == YES
            and self.decode in (YES, NONE)
        )

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON types."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Row:
        """The inverse of ``to_dict``."""
        return Row(**values)


def summary(rows: list[Row]) -> list[str]:
    """The table in two lines: how many families of each sort are fused, and where all else holds too."""
    lines = []
    for word, decorated in (("decorated", True), ("other", False)):
        if group := [r for r in rows if r.decorated == decorated]:
            fused = sum(r.all_fused for r in group)
            whole = sum(r.whole for r in group)
            lines.append(
                f"{fused} of {len(group)} {word} families fused in every block; "
                f"of these, {whole} without a graph break of moec's own, equal to eager, in training and decoding too"
            )
    return lines
