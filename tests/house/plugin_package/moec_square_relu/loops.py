"""The backend ``loops``: experts one after the other, by the op's own definition; it leaves routers to others."""

from __future__ import annotations

from moec.backends.base import Support
from moec.backends.reference import ReferenceBackend
from moec.ir.core import Op


class LoopsBackend(ReferenceBackend):
    """Runs experts one after the other."""

    name = "loops"

    def supports(self, op: Op, target: str) -> Support:
        if op.name != "moe.experts":
            return Support.no("it runs experts only")
        return super().supports(op, target)
