"""What can be wrong with a compile ahead of time."""

from __future__ import annotations

from moec.ir.errors import MoecError


class AotError(MoecError):
    """A model that cannot be compiled ahead of time, or an option that does not fit it."""

    code = "aot"


class NoBlockError(MoecError):
    """The model has no MoE block."""

    code = "no-moe"
