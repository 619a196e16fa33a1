"""Why a block is not raised."""

from __future__ import annotations

from moec.ir.core import Op

LONE = (
    "an expert GEMM without a second one: no up and down projection to fuse; "
    "single grouped GEMMs run as PyTorch runs them"
)
"""The reason of a GEMM that is no half of a block."""


class Refusal(Exception):
    """The block does not fit; ``str`` is the reason that the user reads, ``op`` the place that shows it."""

    def __init__(self, reason: str, op: Op | None = None) -> None:
        super().__init__(reason)
        self.op = op
