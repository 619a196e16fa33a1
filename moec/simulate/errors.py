"""The error of the simulator."""

from __future__ import annotations

from moec.ir.errors import MoecError


class SimulationError(MoecError):
    """Something that cannot be simulated: a topology, a plan that does not fit it, a program without sizes."""

    code = "simulate"
