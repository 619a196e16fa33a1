"""Machines and programs drawn at random: one tier and two, uneven and empty messages, waits anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from moec.simulate.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from moec.simulate.steps import Collective, Compute, Flow, Start, Step, Wait
from moec.simulate.topology import Topology
from tests.simulate.machines import machine

SIZES = st.sampled_from((0.0, 10.0, 1000.0, 7000.0))
SECONDS = st.sampled_from((0.0, 0.001, 0.01))
SHAPES = ((2, 1), (3, 1), (5, 1), (1, 2), (1, 3), (2, 2), (2, 3))  # ranks of a node, nodes


@dataclass(frozen=True)
class Job:
    """Programs of all ranks of a machine."""

    programs: list[list[Step]]
    collectives: list[Collective]
    machine: Topology


@st.composite
def messages(draw: st.DrawFn, made: Topology) -> list[Flow]:
    """Those of one collective; an all-to-all may be skewed, and some of its ranks send or receive nothing."""
    ranks = range(made.ranks)
    kind = draw(st.sampled_from(("all_to_all", "all_to_all", "all_gather", "reduce_scatter", "all_reduce")))
    if kind == "all_reduce":
        return all_reduce(ranks, draw(SIZES), made)
    if kind == "all_to_all":
        return all_to_all(ranks, [[draw(SIZES) for _ in ranks] for _ in ranks])
    sizes = [draw(SIZES) for _ in ranks]
    return (all_gather if kind == "all_gather" else reduce_scatter)(ranks, sizes, made)


@st.composite
def jobs(draw: st.DrawFn, slowed: float = 1.0) -> Job:
    """All ranks run the collectives of a group in the same order. Ops take ``slowed`` times as long beside one."""
    per_node, nodes = draw(st.sampled_from(SHAPES))
    made, count = machine(per_node, nodes, start_s=1e-4), draw(st.integers(1, 6))
    ranks = tuple(range(made.ranks))
    collectives = [
        Collective(f"c{i}", draw(st.sampled_from(("a", "b"))), ranks, tuple(draw(messages(made)))) for i in range(count)
    ]
    programs = []
    for _ in ranks:
        steps: list[Step] = []
        open_: list[int] = []
        for i in range(count):
            seconds = draw(SECONDS)
            steps += [Compute("x", seconds, seconds * slowed), Start(i)]
            open_.append(i)
            while open_ and draw(st.booleans()):
                steps.append(Wait(open_.pop(draw(st.integers(0, len(open_) - 1)))))
        programs.append([*steps, *(Wait(i) for i in open_)])
    return Job(programs, collectives, made)
