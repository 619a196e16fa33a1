"""A simulator of expert parallelism: runs the scheduled IR of all ranks on a machine that is not there."""

from __future__ import annotations

from moec.simulate.errors import SimulationError
from moec.simulate.events import simulate
from moec.simulate.report import Report, make_report
from moec.simulate.routing import Routing
from moec.simulate.run import Outcome, Setting, run_graphs
from moec.simulate.steps import Timeline
from moec.simulate.topology import Topology, known_topologies, load_topology
from moec.simulate.trace import Trace, trace

__all__ = [
    "Outcome",
    "Report",
    "Routing",
    "Setting",
    "SimulationError",
    "Timeline",
    "Topology",
    "Trace",
    "known_topologies",
    "load_topology",
    "make_report",
    "run_graphs",
    "simulate",
    "trace",
]
