"""A simulator of expert parallelism: runs what all ranks do on a machine that is not there."""

from __future__ import annotations

from moec.simulate.errors import SimulationError
from moec.simulate.events import Timeline, simulate
from moec.simulate.topology import Topology, known_topologies, load_topology

__all__ = ["SimulationError", "Timeline", "Topology", "known_topologies", "load_topology", "simulate"]
