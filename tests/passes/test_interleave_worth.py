"""What interleaving is predicted to do: closed forms, the times of ``overlap``, and what the pass does with them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.ir.core import Graph, Op
from moec.ir.parser import parse_graph
from moec.parallel.sample import sample_layer
from moec.passes import PassContext, PassManager
from moec.passes.interleave_layers import InterleaveLayers
from moec.passes.interleave_layers.order import Task, apart, in_order
from moec.passes.interleave_layers.pieces import Pieces, Step, pieces_of
from moec.passes.interleave_layers.worth import expand, seconds, worth
from moec.passes.overlap.by_experts import cut_by_experts
from moec.passes.overlap.chunks import Chunks
from moec.passes.overlap.order import reorder
from moec.passes.overlap.plan import BACKWARD, FORWARD, read_layer
from moec.passes.overlap.policies import schedule, uncut
from moec.passes.overlap.timeline import makespan

LAYER: Pieces = (
    (Step("start", 3.0),),
    (Step("wait", of=0), Step("compute", 2.0), Step("start", 3.0)),
    (Step("wait", of=1),),
)
CLOSE = 1e-9


def numbered(pieces: Pieces) -> list[tuple[int, Step]]:
    return [(0, step) for piece in pieces for step in piece]


def test_one_layer_alone_waits_for_all_that_travels() -> None:
    assert seconds(numbered(LAYER)) == 3 + 2 + 3


def test_what_is_computed_meanwhile_bears_what_sending_takes() -> None:
    start, wait = Step("start", 4.0, burden=2.0), Step("wait", of=0)
    assert seconds([(0, start), (0, Step("compute", 4.0)), (0, wait)]) == 4 + 2
    assert seconds([(0, start), (0, Step("compute", 2.0)), (0, wait)]) == 4
    assert seconds([(0, start), (0, wait), (0, Step("compute", 4.0))]) == 8


def two_batches(layers: int = 1) -> tuple[list[Task], list[int]]:
    """Attention, layer, attention, ...: all of one micro-batch, then all of the other."""
    tasks: list[Task] = []
    for _ in range(2):
        for i in range(2 * layers):
            tasks.append(Task((len(tasks) - 1,) if i else ()))
    return tasks, [i for i in range(len(tasks)) if i % 2]


@pytest.mark.parametrize(("each", "least"), [(0.0, 17.0), (0.5, 17.0 + 0.5 + 0.5), (4.0, 4 * 6 + 8 + 4)])
def test_two_micro_batches(each: float, least: float) -> None:
    """A 0-4; A's rows 4-7; B 4-8; B's rows 8-11; A's experts 8-10, home 11-14; B's experts 11-13, home 14-17."""
    tasks, layers = two_batches()
    found = worth(tasks, dict.fromkeys(layers, LAYER), {0: 4.0, 2: 4.0}, layers, each)
    assert found.in_turn == 2 * (4 + 3 + 2 + 3)
    assert found.interleaved == pytest.approx(least) if each < 1 else found.interleaved >= least
    assert found.pays == (each < 1)


def test_nothing_is_won_where_nothing_else_is_computed_and_links_are_busy() -> None:
    tasks, layers = two_batches()
    idle: Pieces = ((Step("start", 3.0),), (Step("wait", of=0), Step("start", 3.0)), (Step("wait", of=1),))
    found = worth(tasks, dict.fromkeys(layers, idle), {}, layers, 0.0)
    assert found.in_turn == found.interleaved == 12 and not found.pays


def random_tasks(rng: random.Random) -> tuple[list[Task], list[int]]:
    tasks: list[Task] = []
    for i in range(rng.randint(1, 25)):
        kind: Any = rng.choices(("op", "wait", "fence"), (8, 1, 1))[0]
        tasks.append(Task(tuple(sorted(rng.sample(range(i), min(i, rng.randint(0, 3))))), kind))
    return tasks, [i for i, t in enumerate(tasks) if t.kind == "op" and rng.random() < 0.4]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9))
def test_any_order_is_a_permutation_that_keeps_needs_and_fences(seed: int) -> None:
    tasks, layers = random_tasks(random.Random(seed))
    made, origin = expand(tasks, dict.fromkeys(layers, 3))
    order = in_order(made)
    assert sorted(order) == list(range(len(made)))
    place = {i: at for at, i in enumerate(order)}
    assert all(place[n] < place[i] for i in order for n in made[i].needs)
    for fence in (i for i, t in enumerate(made) if t.kind == "fence"):
        assert place[fence] == fence, "all that stood before it does, and no more"
    assert [origin[i] for i in sorted(order)] == origin
    work = dict.fromkeys(range(len(tasks)), 1.0)
    found = worth(tasks, dict.fromkeys(layers, LAYER), {i: 1.0 for i in work if i not in layers}, layers, 0.0)
    busy = len(tasks) - len(layers) + 2 * len(layers)
    assert found.interleaved >= max(busy, 6 * len(layers)) and found.in_turn == busy + 6 * len(layers)


def test_apart() -> None:
    tasks, layers = two_batches(2)
    assert apart(tasks, layers, layers) == (layers, [])
    fenced = [*tasks[:4], Task((), "fence"), *(Task(tuple(n + 1 for n in t.needs)) for t in tasks[4:])]
    assert apart(fenced, [1, 3, 6, 8], [1, 3, 6, 8]) == ([], [1, 3, 6, 8])
    assert apart(tasks[:4], [1, 3], [0, 1, 2, 3]) == ([], []), "one micro-batch"


# --- programs ------------------------------------------------------------------------------------------------------


LINK = Link(0.0, 1e6)
CURVE = LayerCurve(1e-5, ((1.0, 1e-5), (64.0, 6e-4)))


@dataclass(frozen=True)
class Costs:
    """A cost model of one curve and one link."""

    link: Link | None = LINK
    each: float | None = 1e-6
    dense: float = 1e-3
    taken: Link | None = None

    def expert_times(self, op: Op, backward: bool = False) -> LayerCurve:
        return CURVE.times(2.0) if backward else CURVE

    def transport(self, group: str, ranks: int) -> Link | None:
        return self.link

    def copying(self, group: str, bytes: float) -> float:
        return 0.0

    def chunk_seconds(self, op: Op, place: int, along: str) -> float:
        return 0.0

    def burden(self, group: str) -> Link | None:
        return self.taken

    def dense_seconds(self, group: str, rows: float, inputs: float, outputs: float, dtype: str) -> float | None:
        return self.dense

    def piece_seconds(self, group: str) -> float | None:
        return self.each


def whole(pieces: Pieces | None) -> Iterable[tuple[int, Step]]:
    assert pieces is not None
    return numbered(pieces)


@pytest.mark.parametrize("place", [FORWARD, BACKWARD])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_layer_takes_what_overlap_says(place: int, chunks: int) -> None:
    text = "expert-parallel" + (f",overlap{{chunks={chunks}}}" if chunks > 1 else "")
    ctx = PassContext(cost_model=Costs())
    plain, cut = (sample_layer((4, 4), 4, 2, 16, 32) for _ in range(2))
    PassManager("expert-parallel", repro=None).run(plain, PassContext())
    PassManager(text, repro=None).run(cut, PassContext())
    layer = read_layer(plain.ops[0], place, ctx, 64)
    want = schedule(layer, "experts", (1,) * chunks) if chunks > 1 else uncut(layer)
    found = pieces_of(cut.ops[0], cut.ops[0].regions[place], place, ctx, 64)
    assert seconds(whole(found)) == pytest.approx(makespan(want.chunks), rel=CLOSE)


@pytest.mark.parametrize("place", [FORWARD, BACKWARD])
def test_chunks_of_any_experts_count_as_those_that_hold_as_many(place: int) -> None:
    graph, ctx = sample_layer((4, 4), 4, 2, 16, 32), PassContext(cost_model=Costs())
    PassManager("expert-parallel", repro=None).run(graph, PassContext())
    op, found = graph.ops[0], []
    mixed = (((0, 1, 3), (1, 2, 3)), ((2,), (0,)))
    for chunks in (Chunks((4, 4), ((0, 0), (3, 3), (4, 4))), Chunks.of((4, 4), mixed, rank=0)):
        region = cut_by_experts(op.regions[place], chunks)
        reorder(region)
        found.append([step for _, step in whole(pieces_of(op, region, place, ctx, 64))])
    stand, other = found
    assert [s for s in stand if s.kind == "compute"] == [s for s in other if s.kind == "compute"]
    assert [s.seconds for s in stand if s.kind == "start"] == [s.seconds for s in other if s.kind == "start"]


def test_threads_that_send_take_no_more_than_the_time_of_what_travels() -> None:
    graph = sample_layer((4, 4), 4, 2, 16, 32)
    PassManager("expert-parallel", repro=None).run(graph, PassContext())
    op = graph.ops[0]
    for taken in (Link(1e-6, 1e12), Link(1.0, 1.0)):
        found = whole(pieces_of(op, op.regions[0], 0, PassContext(cost_model=Costs(taken=taken)), 64))
        counts, *starts = (step for _, step in found if step.kind == "start")
        assert counts.burden == counts.seconds == 0.0
        assert starts and all(0 < step.burden <= step.seconds for step in starts)
        assert all((step.burden == step.seconds) == (taken.alpha_s == 1.0) for step in starts)


def test_what_is_not_known() -> None:
    graph = sample_layer((4, 4), 4, 2, 16, 32)
    PassManager("expert-parallel", repro=None).run(graph, PassContext())
    op = graph.ops[0]
    for costs, tokens in ((None, 64), (Costs(), 0), (Costs(link=None), 64)):
        assert pieces_of(op, op.regions[0], 0, PassContext(cost_model=costs), tokens) is None


def program() -> Graph:
    """Two micro-batches, each projected and then run through a layer; behind ``expert-parallel``."""
    text = (Path(__file__).parent / "filecheck" / "interleave-layers.moe").read_text().split("// -----")[0]
    graph = parse_graph(text[text.index("graph @dual") :])
    for arg in graph.args:
        if arg.name == "o":
            arg.meta["target"] = "o"
    PassManager("expert-parallel", repro=None).run(graph, PassContext())
    return graph


@pytest.mark.parametrize(
    ("pass_", "costs", "kind", "says"),
    [
        (InterleaveLayers(tokens=64), Costs(), "applied", " ms instead of "),
        (InterleaveLayers(tokens=64), Costs(each=1.0), "missed", "the program stays in turn: so it takes"),
        (InterleaveLayers(tokens=64), Costs(link=Link(0.0, 1e15)), "missed", "stays in turn"),
        (InterleaveLayers(always=True), Costs(each=1.0), "applied", "2 times"),
        (InterleaveLayers(), Costs(each=1.0), "applied", "2 times"),
        (InterleaveLayers(tokens=64), Costs(each=None), "applied", "2 times"),
        (InterleaveLayers(tokens=64), None, "applied", "2 times"),
    ],
)
def test_the_pass_asks_whether_it_pays(pass_: InterleaveLayers, costs: Costs | None, kind: str, says: str) -> None:
    graph = program()
    before, ctx = str(graph), PassContext(cost_model=costs)
    result = pass_.run(graph, ctx)
    assert result.modified == (kind == "applied") == (str(graph) != before)
    assert all(r.kind == kind and says in r.message for r in ctx.remarks) and ctx.remarks
    if costs is None or (kind == "applied" and "instead" not in says):
        assert not any("instead" in r.message for r in ctx.remarks)


def test_a_block_alone_is_left_to_the_door() -> None:
    graph = program()
    assert not InterleaveLayers(always=True).run(graph, PassContext(cut_as="block")).modified
