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


@dataclass(frozen=True)
class Span:
    """One piece of work.

    Attributes:
        what: ``compute`` or ``travel``.
        task: What it is of.
        start: Seconds from the start of the graph.
        end: The same.
    """

    what: str
    task: int
    start: float
    end: float


def timeline(steps: Iterable[tuple[int, Step]]) -> list[Span]:
    """Every piece of work, in the order in which it is begun.

    Args:
        steps: Steps in their order, with the task that each is of: a wait's number counts starts of its task.
    """
    now = free = busy = 0.0
    spans: list[Span] = []
    under_way: dict[int, list[tuple[float, Step, float]]] = {}
    for task, step in steps:
        if step.kind == "compute":
            spans.append(Span("compute", task, now, now + step.seconds))
            now, busy = now + step.seconds, busy + step.seconds
        elif step.kind == "start":
            spans.append(Span("travel", task, max(now, free), max(now, free) + step.seconds))
            free = spans[-1].end
            under_way.setdefault(task, []).append((free, step, busy))
        else:
            arrives, start, busy_before = under_way[task][step.of]
            if start.seconds > 0:
                now += start.burden * min(1.0, (busy - busy_before) / start.seconds)
            now = max(now, arrives)
    return [*spans, Span("compute", -1, now, now)]


def seconds(steps: Iterable[tuple[int, Step]]) -> float:
    """When the last of the steps (as in :func:`timeline`) is done on the rank."""
    return timeline(steps)[-1].end


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


def in_turn(
    tasks: Sequence[Task], layers: Mapping[int, Pieces], computing: Mapping[int, float]
) -> list[tuple[int, Step]]:
    """The steps of a graph as it is.

    Args:
        tasks: All tasks.
        layers: What happens in each layer.
        computing: Seconds of other tasks; what is not in it takes none.
    """
    return [(i, step) for i in range(len(tasks)) for step in _whole(i, layers, computing)]


def interleaved(
    tasks: Sequence[Task], layers: Mapping[int, Pieces], computing: Mapping[int, float], split: Iterable[int],
    piece_seconds: float,
) -> list[tuple[int, Step]]:  # fmt: skip
    """The steps with layers in pieces, in the order that they allow.

    Args:
        tasks, layers, computing: As in :func:`in_turn`.
        split: Which layers are run in pieces.
        piece_seconds: What each op of a layer in pieces takes beside.
    """
    cut = set(split)
    made, origin = expand(tasks, {i: len(layers[i]) for i in cut})
    found: list[tuple[int, Step]] = []
    for i, piece in (origin[number] for number in in_order(made)):
        if i in cut:
            found += [(i, Step("compute", piece_seconds)), *((i, step) for step in layers[i][piece])]
        else:
            found += [(i, step) for step in _whole(i, layers, computing)]
    return found


def _whole(i: int, layers: Mapping[int, Pieces], computing: Mapping[int, float]) -> list[Step]:
    if i in layers:
        return [step for piece in layers[i] for step in piece]
    return [Step("compute", computing[i])] if i in computing else []


def worth(
    tasks: Sequence[Task], layers: Mapping[int, Pieces], computing: Mapping[int, float], split: Iterable[int],
    piece_seconds: float,
) -> Worth:  # fmt: skip
    """Compare a graph as it is with the order that layers in pieces allow; arguments as in :func:`interleaved`."""
    dual = interleaved(tasks, layers, computing, split, piece_seconds)
    return Worth(seconds(in_turn(tasks, layers, computing)), seconds(dual))
