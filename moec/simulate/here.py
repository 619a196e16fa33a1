"""This machine as a topology: processes of one thread each that talk by gloo, as ``moec profile`` measured them."""

from __future__ import annotations

from dataclasses import replace

from moec.cost.machine import MachineProfile
from moec.cost.store import load_profile
from moec.simulate.errors import SimulationError
from moec.simulate.topology import Device, Topology
from moec.targets import parse_target

HERE = "here"


def here() -> Topology:
    """The stored profile of this processor, as a topology.

    Raises:
        SimulationError: There is none, or links were not measured for it.
    """
    machine = load_profile()
    if machine is None:
        raise SimulationError("this machine was not measured", hint="moec profile; or --topology cpu, assumed numbers")
    return topology_of(machine)


def topology_of(machine: MachineProfile) -> Topology:
    """As many ranks as the most processes whose links were measured.

    A rank has one core and its share of the memory's bandwidth, as all ranks read at once. Latencies hold the start of
    a collective, as the measured ones do, and an op's launch is a call that does nothing.

    Raises:
        SimulationError: No links were measured.
    """
    if not machine.links:
        raise SimulationError(
            "the profile of this machine has no links between processes", hint="run `moec profile` again"
        )
    ranks, link = machine.links[-1]
    assumed = parse_target("cpu")
    flops = {dtype: rate / assumed.cores for dtype, rate in assumed.flops} | {d: rate for d, _, rate in machine.flops}
    share = machine.bytes_per_s(machine.cores) / machine.cores
    target = replace(assumed, cores=1, memory_bandwidth=share, flops=tuple(flops.items()))
    device = Device(target, launch_s=machine.call_seconds, start_s=0.0, machine=machine)
    return Topology(HERE, f"{ranks} processes of {machine.name}, as measured", device, 1, ranks, link)
