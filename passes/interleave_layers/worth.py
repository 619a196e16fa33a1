"""How long a rank takes for a graph, in one order or another, and whether layers in pieces pay.

A rank computes one thing at a time and the links carry one collective at a time, in the order of their starts; all
ranks are taken to be as busy as the busiest. What a collective takes of the processor counts where something is
computed meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moec.passes.interleave_layers.order import Task, in_order
from moec.passes.interleave_layers.pieces import Pieces, Step

LEAST = 0.01
"""Part of the time that has to be won: predictions are not better than that."""


@dataclass(frozen=True)
class Worth:
    """What interleaving is predicted to do.

    Attributes:
        in_turn: Seconds of the graph with every layer in one piece.
        interleaved: Seconds with layers in pieces.
    """

    in_turn: float
    interleaved: float

    @property
    def pays(self) -> bool:
        return self.interleaved < self.in_turn * (1 - LEAST)


def seconds(steps: Iterable[tuple[int, Step]]) -> float:
    """When the last of the steps is done.

    Args:
        steps: Steps in their order, with the layer that each is of: a wait's number counts starts of its layer.
    """
    now = free = busy = 0.0
    under_way: dict[int, list[tuple[float, Step, float]]] = {}
    for layer, step in steps:
        if step.kind == "compute":
            now, busy = now + step.seconds, busy + step.seconds
        elif step.kind == "start":
            free = max(now, free) + step.seconds
            under_way.setdefault(layer, []).append((free, step, busy))
        else:
            arrives, start, busy_before = under_way[layer][step.of]
            if start.seconds > 0:
                now += start.burden * min(1.0, (busy - busy_before) / start.seconds)
            now = max(now, arrives)
    return now


def expand(tasks: Sequence[Task], counts: Mapping[int, int]) -> tuple[list[Task], list[tuple[int, int]]]:
    """The tasks with some layers in pieces.

    Args:
        tasks: All tasks.
        counts: Of how many pieces a layer is, by its number.

    Returns:
        The new tasks, and for each the number of the old one and which of its pieces it is.
    """
    made: list[Task] = []
    origin: list[tuple[int, int]] = []
    ends: list[int] = []
    for i, task in enumerate(tasks):
        needs = tuple(ends[n] for n in task.needs)
        if i in counts:
            made.append(Task(needs, "begin"))
            origin.append((i, 0))
            for piece in range(1, counts[i]):
                made.append(Task((len(made) - 1,), "resume"))
                origin.append((i, piece))
        else:
            made.append(Task(needs, task.kind))
            origin.append((i, 0))
        ends.append(len(made) - 1)
    return made, origin


def worth(
    tasks: Sequence[Task], layers: Mapping[int, Pieces], computing: Mapping[int, float], split: Iterable[int],
    piece_seconds: float,
) -> Worth:  # fmt: skip
    """Compare a graph as it is with the order that layers in pieces allow.

    Args:
        tasks: All tasks.
        layers: What happens in each layer.
        computing: Seconds of other tasks; what is not in it takes none.
        split: Which layers are run in pieces.
        piece_seconds: What each op of a layer in pieces takes beside.
    """

    def steps(i: int) -> list[Step]:
        return [Step("compute", computing[i])] if i in computing else []

    whole = [
        (i, s) for i in range(len(tasks)) for s in ([x for p in layers[i] for x in p] if i in layers else steps(i))
    ]
    made, origin = expand(tasks, {i: len(layers[i]) for i in split})
    cut = set(split)
    dual: list[tuple[int, Step]] = []
    for number in in_order(made):
        i, piece = origin[number]
        if i in cut:
            dual += [(i, Step("compute", piece_seconds)), *((i, s) for s in layers[i][piece])]
        else:
            dual += [(i, s) for s in ([x for p in layers[i] for x in p] if i in layers else steps(i))]
    return Worth(seconds(whole), seconds(dual))
