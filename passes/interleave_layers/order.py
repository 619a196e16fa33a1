"""An order in which a rank waits for rows only where nothing else is ready.

It is found for tasks, of which only is known what they need: the ops of a whole program, or the nodes of a graph that
autograd made. What decides is which layers need which, so that ranks whose graphs differ in small ops, as they have
other numbers of tokens, begin the same collectives in the same order all the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["op", "begin", "resume", "wait", "fence"]


@dataclass(frozen=True)
class Task:
    """One op.

    Attributes:
        needs: Numbers of the tasks whose results it takes; all of them stand before it.
        kind: ``begin`` sends a layer's rows and ``resume`` waits for them; ``wait`` waits for something else; a
            ``fence`` has an effect, so nothing passes it.
    """

    needs: tuple[int, ...] = ()
    kind: Kind = "op"


def in_order(tasks: Sequence[Task]) -> list[int]:
    """The tasks in an order in which waits come as late as can be.

    Of what is ready and does not wait, that goes first which the first layer to be begun needs. Of what only waits,
    layers go on in the order in which they were left; what nothing but the end needs goes last.
    """
    found: list[int] = []
    part: list[int] = []
    for i, task in enumerate(tasks):
        if task.kind == "fence":
            found += [*_between(tasks, part), i]
            part = []
        else:
            part.append(i)
    return found + _between(tasks, part)


def _between(tasks: Sequence[Task], part: Sequence[int]) -> list[int]:
    """The order of what stands between two fences."""
    users: dict[int, list[int]] = {i: [] for i in part}
    missing: dict[int, int] = {}
    for i in part:
        needs = {n for n in tasks[i].needs if n in users}
        missing[i] = len(needs)
        for n in needs:
            users[n].append(i)
    begins = [i for i in part if tasks[i].kind == "begin"]
    last = len(begins)
    serves = {b: number for number, b in enumerate(begins)}
    for i in reversed(part):
        serves[i] = min((serves[u] for u in users[i]), default=last) if i not in serves else serves[i]
    moving: list[tuple[int, int]] = []
    waiting: list[tuple[bool, int, int]] = []
    done: dict[int, int] = {}

    def ready(i: int) -> None:
        if tasks[i].kind in ("resume", "wait"):
            left_at = max((done.get(n, -1) for n in tasks[i].needs), default=-1)
            idle = tasks[i].kind == "wait" and serves[i] == last
            heapq.heappush(waiting, (idle, left_at, i))
        else:
            heapq.heappush(moving, (serves[i], i))

    for i in part:
        if not missing[i]:
            ready(i)
    while moving or waiting:
        i = heapq.heappop(moving)[-1] if moving else heapq.heappop(waiting)[-1]
        done[i] = len(done)
        for u in users[i]:
            missing[u] -= 1
            if not missing[u]:
                ready(u)
    return list(done)


def apart(tasks: Sequence[Task], layers: Sequence[int], large: Collection[int]) -> tuple[list[int], list[int]]:
    """Layers beside which something of ``large`` could run, and those where only a fence forbids it.

    Args:
        tasks: All tasks.
        layers: Numbers of those that are layers.
        large: Of what takes long enough to be worth it, layers too.
    """
    before: list[int] = []  # the tasks before each, as bits
    for task in tasks:
        bits = 0
        for n in task.needs:
            bits |= before[n] | 1 << n
        before.append(bits)
    part, parts = 0, []
    for task in tasks:
        part += task.kind == "fence"
        parts.append(part)
    free, fenced = [], []
    for i in layers:
        beside = [j for j in large if j != i and not before[i] >> j & 1 and not before[j] >> i & 1]
        if any(parts[j] == parts[i] for j in beside):
            free.append(i)
        elif beside:
            fenced.append(i)
    return free, fenced
