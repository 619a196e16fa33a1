"""Loops in which experts choose their tokens (expert choice, arXiv:2202.09368): ``token = chosen[e]``.

``chosen`` is ``[E, C]``, C tokens for each expert. The block works on the rows ``x[chosen.flatten()]``, of which each
has one expert, and one ``index_add`` brings them home.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.ir.attributes import Literal
from moec.ir.core import Graph, Value
from moec.ir.types import as_dim
from moec.passes.matching import peel_views, rank, same_dim, tensor
from moec.passes.raise_moe.block import Block, Emitter
from moec.passes.raise_moe.loop_branches import Branch, read_branches
from moec.passes.raise_moe.loop_columns import read_column, shared_factor
from moec.passes.raise_moe.loop_experts import Expert, collect, find_gemms, is_expert, read_expert
from moec.passes.raise_moe.loop_ids import choices_differ
from moec.passes.raise_moe.loop_rows import Weighting, read_gather, read_weighting
from moec.passes.raise_moe.loop_steps import Chain
from moec.passes.raise_moe.loop_write import cast_all, no_weights
from moec.passes.raise_moe.loops import check_writes, differing, has_gemms, starts_at_zero
from moec.passes.raise_moe.refusal import Refusal


@dataclass(frozen=True)
class ChosenLoop:
    """A loop over experts that choose tokens, read.

    Attributes:
        chain: Its steps.
        chosen: The tokens of each expert, ``[E, C]``.
        x: Where the rows come from.
        weighting: The end of the first expert's program.
        expert: Its program.
        branches: All experts, in order.
    """

    chain: Chain
    chosen: Value
    x: Value
    weighting: Weighting
    expert: Expert
    branches: list[Branch]

    @property
    def out(self) -> Value:
        """The loop's result, in whose place the block stands."""
        return self.chain.out

    @property
    def what(self) -> str:
        """In words."""
        return f"loop over {len(self.branches)} experts that choose their tokens"

    def write(self, emit: Emitter) -> Value:
        """Write the block and the way home; the new sum."""
        table, x, out = tensor(self.chosen), tensor(self.x), tensor(self.chain.out)
        assert table is not None and x is not None and out is not None
        rows = table.shape[0] * table.shape[1]
        flat = emit.call("aten.reshape.default", (self.chosen, [-1]), table.with_(shape=(rows,)))
        taken = emit.call("aten.index.Tensor", (self.x, [flat]), x.with_(shape=(rows, x.shape[1])))
        slots = table.with_(shape=(rows, as_dim(1)))
        factor = self.weighting.factor
        ids = self._ids(emit)
        if factor is None:
            weights = no_weights(emit, self.weighting, ids)
        else:
            given = cast_all(emit, factor.weights, factor.casts)
            g = tensor(given)
            assert g is not None
            weights = emit.call("aten.reshape.default", (given, [-1, 1]), slots.with_(dtype=g.dtype))
        *ups, down = collect(self.expert, self.branches[0].outside, [b.outside for b in self.branches])
        block = Block(
            x=cast_all(emit, taken, self.expert.casts),
            ids=ids,
            weights=weights,
            top_k=as_dim(1),
            experts=len(self.branches),
            ups=ups,
            down=down,
            activation=self.expert.activation,
            inner=self.expert.down.rows,
            post=self.expert.post,
            finished=self.expert.finished,
            out=out.with_(shape=(rows, out.shape[1])),
        )
        return emit.call("aten.index_add.default", (self.chain.start, 0, flat, block.write(emit, "")), out)

    def _ids(self, emit: Emitter) -> Value:
        """The expert of every row, ``[E * C, 1]``."""
        table = tensor(self.chosen)
        assert table is not None
        experts, rows = table.shape[0], table.shape[0] * table.shape[1]
        kwargs = {"dtype": table.dtype, "device": Literal("device", table.device)}
        numbers = emit.call("aten.arange.default", (int(experts),), table.with_(shape=(experts,)), kwargs)
        column = emit.call("aten.unsqueeze.default", (numbers, 1), table.with_(shape=(experts, as_dim(1))))
        wide = emit.call("aten.expand_as.default", (column, self.chosen), table)
        return emit.call("aten.reshape.default", (wide, [-1, 1]), table.with_(shape=(rows, as_dim(1))))


def read_chosen(graph: Graph, chain: Chain) -> ChosenLoop | None:
    """The loop whose sums are ``chain``, or None if its experts do not choose tokens from one table.

    Raises:
        Refusal: They do, and it does not fit.
    """
    places = [read_column(step.index) for step in chain.steps]
    tables = {(p.source, p.dim) if p is not None else None for p in places}
    if len(tables) != 1 or None in tables:
        return None
    chosen = places[0].source  # type: ignore[union-attr]
    experts = [p.expert for p in places if p is not None]
    table, out = tensor(chosen), tensor(chain.out)
    branches = read_branches(graph, chain.steps, experts, [step.index for step in chain.steps])
    if table is None or out is None or table.dtype.kind != "int" or not has_gemms(branches):
        return None
    chain.check()
    branches = sorted(branches, key=lambda b: b.expert)
    _check_table(chain, chosen, branches)
    starts_at_zero(chain)
    first = branches[0]
    weighting = read_weighting(first, lambda column: shared_factor(column, branches, 0))
    rows, x = read_gather(first, weighting.factor)
    if not is_expert(find_gemms(first, rows), rows):
        raise Refusal("an expert of the loop is no up and down projection", first.step.op)
    own = differing(branches)
    if x in own:
        raise Refusal("the experts of the loop read the rows of different tensors", first.step.op)
    factor = weighting.factor
    columns = [v for v in own if factor is not None and (c := read_column(v)) and c.source is factor.weights]
    per_token = {x, chosen, *columns, *([factor.weights] if factor is not None else [])}
    per_token |= {peel_views(v) for v in per_token} | {first.root}
    expert = read_expert(first, rows, weighting.finished, per_token, [v for v in own if v not in columns])
    check_writes(graph, branches)
    return ChosenLoop(chain, chosen, x, weighting, expert, branches)


def _check_table(chain: Chain, chosen: Value, branches: Sequence[Branch]) -> None:
    table = tensor(chosen)
    assert table is not None
    if len({b.key for b in branches}) != 1:
        raise Refusal("the experts of the loop run different programs", chain.steps[0].op)
    if [b.expert for b in branches] != list(range(len(branches))) or not same_dim(table.shape[0], len(branches)):
        raise Refusal("not every row of the table of chosen tokens has its expert in the loop", chain.steps[0].op)
    if rank(chosen) != 2:
        raise Refusal("the table of chosen tokens is no matrix", chain.steps[0].op)
    for step in chain.steps:
        if step.mode == "write" or (step.mode == "add-once" and not choices_differ(chosen)):
            raise Refusal("the loop writes rows of tokens that other experts may have chosen too", step.op)
