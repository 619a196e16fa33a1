"""Why a block is not raised."""

from __future__ import annotations

from moec.ir.core import Op


class Refusal(Exception):
    """The block does not fit; ``str`` is the reason that the user reads, ``op`` the place that shows it."""

    def __init__(self, reason: str, op: Op | None = None) -> None:
        super().__init__(reason)
        self.op = op
