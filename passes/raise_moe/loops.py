"""Reading a MoE layer written as a Python loop over experts: its steps, read together, are one block.

Contract:
1. All experts read the same tokens, ids and weights, and run the same program with weights of their own. Those that run
   another one must be cheap functions of a token (zero-compute experts).
2. What does not fit is a ``Refusal``; what is no loop over experts is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from moec.ir.core import Graph, Value
from moec.passes.hazards import write_within
from moec.passes.matching import arg, function, maker, peel_views, same_dim, tensor
from moec.passes.raise_moe.loop_branches import Branch, read_branches
from moec.passes.raise_moe.loop_columns import gate_factor
from moec.passes.raise_moe.loop_experts import GEMMS, Expert, find_gemms, is_expert, read_expert
from moec.passes.raise_moe.loop_ids import choices_differ
from moec.passes.raise_moe.loop_masks import Mask, coordinate, read_mask
from moec.passes.raise_moe.loop_rows import Factor, Weighting, read_gather, read_weighting, slot_factor
from moec.passes.raise_moe.loop_steps import Chain, Step
from moec.passes.raise_moe.loop_terms import Term, read_terms
from moec.passes.raise_moe.refusal import Refusal

_UNSET = ("empty", "empty_like", "new_empty", "empty_permuted", "empty_strided")


@dataclass(frozen=True)
class Kind:
    """Experts of a loop that run one program, and that program as the first of them has it.

    Attributes:
        branches: The experts.
        rows: Token rows of the first.
        x: Where they come from.
        weighting: The end of its program.
        columns: Router weights among what it takes in.
    """

    branches: list[Branch]
    rows: Value
    x: Value
    weighting: Weighting
    columns: tuple[Value, ...] = ()

    @property
    def first(self) -> Branch:
        return self.branches[0]

    @property
    def own(self) -> list[Value]:
        """What the first expert takes in and another one has otherwise, router weights aside."""
        return [v for v in differing(self.branches) if v not in self.columns]


def differing(branches: Sequence[Branch]) -> list[Value]:
    """What the first of some branches takes in and another one has otherwise."""
    first, *others = branches
    return [v for i, v in enumerate(first.outside) if any(b.outside[i] is not v for b in others)]


@dataclass(frozen=True)
class Loop:
    """A loop, read.

    Attributes:
        chain: Its steps.
        ids: The experts chosen, ``[T, k]`` or ``[T]``.
        keep: Which choices count; None for all.
        kind: The experts with GEMMs, in order of their numbers.
        expert: Their program.
        terms: The others.
        branches: All experts.
        start: The sum before the loop; None if it is zero.
        out: The loop's result, in whose place the block stands.
    """

    chain: Chain
    ids: Value
    keep: Value | None
    kind: Kind
    expert: Expert
    terms: list[Term]
    branches: list[Branch]
    start: Value | None
    out: Value

    @property
    def what(self) -> str:
        """In words."""
        others = len(self.branches) - len(self.kind.branches)
        return f"loop over {len(self.kind.branches)} experts" + f" and {others} that need no dispatch" * (others > 0)


def _pick(step: Step) -> tuple[Value, Mask] | None:
    """``(root, mask)`` of the tokens that a step adds to."""
    found = coordinate(step.index)
    root, dim = found if found is not None else (step.index, 0)
    mask = read_mask(root)
    if mask is None or mask.expert is None or dim >= len(mask.dims) or mask.dims[dim] != 0:
        return None
    return (root, mask) if found is not None or mask.dims == (0,) else None


def _check_modes(chain: Chain, mask: Mask, fresh: bool) -> None:
    """Refuse steps that do not add every row once."""
    t = tensor(mask.ids)
    assert t is not None
    single = t.rank == 1 or t.shape[1] == 1
    for step in chain.steps:
        if (mask.once or step.mode == "add-once") and not single and not choices_differ(mask.ids):
            raise Refusal("the loop adds once per token, and a token's expert ids may be equal", step.op)
        if step.mode == "write" and not single:
            raise Refusal("out[token] = overwrites what other experts of the same token wrote", step.op)
        if step.mode == "write" and not fresh:
            raise Refusal("out[token] = overwrites a sum that does not start at zero", step.op)


def is_zero(value: Value) -> bool:
    """True for a tensor made of zeros."""
    filled = maker(value, "full", "full_like", "new_full")
    if filled is not None:
        return bool(arg(filled, 2 if function(filled) == "new_full" else 1, "fill_value") == 0)
    return maker(value, "zeros", "zeros_like", "new_zeros") is not None


def starts_at_zero(chain: Chain) -> bool:
    """True if the sum starts at zero, or holds what was never set and is only overwritten.

    Raises:
        Refusal: The loop adds to what was never set.
    """
    unset = maker(chain.start, *_UNSET)
    if unset is not None and any(step.mode != "write" for step in chain.steps):
        raise Refusal("the loop adds to memory that was never set", unset)
    return chain.start is None or unset is not None or is_zero(chain.start)


def kinds_of(branches: Sequence[Branch], marks: Sequence[Hashable]) -> list[list[Branch]]:
    """The branches by program and mark, in order of first occurrence."""
    kinds: dict[Hashable, list[Branch]] = {}
    for branch, mark in zip(branches, marks, strict=True):
        kinds.setdefault((branch.key, mark), []).append(branch)
    return list(kinds.values())


def has_gemms(branches: Sequence[Branch]) -> bool:
    """True if the branches do more than gather and scatter."""
    return any(function(op) in GEMMS for b in branches for op in b.ops)


def read_loop(graph: Graph, chain: Chain) -> Loop | None:
    """The loop whose sums are ``chain``, or None if it is no loop over experts.

    Raises:
        Refusal: It is one, and does not fit.
    """
    picks = [_pick(step) for step in chain.steps]
    if not any(picks):
        return None
    lost = next((s for s, p in zip(chain.steps, picks, strict=True) if p is None), None)
    if lost is not None:
        raise Refusal("the loop adds rows whose tokens do not come from ids == expert", lost.op)
    masks = [p[1] for p in picks if p is not None]
    experts = [m.expert for m in masks if m.expert is not None]
    branches = read_branches(graph, chain.steps, experts, [p[0] for p in picks if p is not None])
    if not has_gemms(branches):
        return None
    chain.check()
    ids, keep = masks[0].ids, masks[0].keep
    if any(m.ids is not ids or m.keep is not keep or m.once != masks[0].once for m in masks):
        raise Refusal("the experts of the loop look at different ids", chain.steps[0].op)
    if len(set(experts)) != len(experts):
        raise Refusal("an expert occurs twice in the loop", chain.steps[0].op)
    fresh = starts_at_zero(chain)
    _check_modes(chain, masks[0], fresh)
    mask_of = dict(zip(experts, masks, strict=True))
    kinds = []
    for group in kinds_of(branches, [m.dims for m in masks]):
        group = sorted(group, key=lambda b: b.expert)
        kinds.append(_read_kind(group, mask_of[group[0].expert]))
    kind, expert = read_experts(kinds, ids, chain)
    terms = [t for k in kinds if k is not kind for t in read_terms(k.branches, k.rows, k.x, k.weighting)]
    check_writes(graph, branches)
    return Loop(chain, ids, keep, kind, expert, terms, branches, None if fresh else chain.start, chain.out)


def _read_kind(group: list[Branch], mask: Mask) -> Kind:
    columns: list[Value] = []

    def factor(column: Value) -> Factor | None:
        found = gate_factor(column, group, mask)
        if found is None:
            return slot_factor(column, group[0], mask)
        columns.append(found[1])
        return found[0]

    weighting = read_weighting(group[0], factor)
    return Kind(group, *read_gather(group[0], weighting.factor), weighting, tuple(columns))


def read_experts(kinds: list[Kind], ids: Value, chain: Chain) -> tuple[Kind, Expert]:
    """The kind that is the real experts, and their program."""
    gemms = [find_gemms(k.first, k.rows) for k in kinds]
    whole = [k for k, found in zip(kinds, gemms, strict=True) if is_expert(found, k.rows)]
    if not whole:
        most = max(map(len, gemms))
        raise Refusal(
            f"an expert of the loop has {most} GEMMs; one or two of its rows and one of what they give are known",
            chain.steps[0].op,
        )
    if len(whole) > 1:
        raise Refusal(f"the experts of the loop run {len(whole)} different programs", whole[1].first.step.op)
    kind = whole[0]
    for other in kinds:
        _check_shared(other, kind)
    x, i, out = tensor(kind.x), tensor(ids), tensor(chain.out)
    assert x is not None and i is not None and out is not None
    if i.rank > 2 or not same_dim(x.shape[0], i.shape[0]) or not same_dim(x.shape[0], out.shape[0]):
        raise Refusal("tokens, ids and the loop's sum do not have as many rows", chain.steps[0].op)
    if i.rank == 2 and not i.shape[1].is_Integer:
        raise Refusal("the number of experts per token is not known before run time", chain.steps[0].op)
    factor = kind.weighting.factor
    per_token = {kind.x, ids, kind.first.root, kind.first.step.index}
    per_token |= {factor.weights} if factor is not None else set()
    per_token |= {peel_views(v) for v in per_token}
    return kind, read_expert(kind.first, kind.rows, kind.weighting.finished, per_token, kind.own)


def _check_shared(kind: Kind, other: Kind) -> None:
    """Refuse a loop whose experts read different tokens or weights."""
    if kind.x is not other.x or kind.x in kind.own:
        raise Refusal("the experts of the loop read the rows of different tensors", kind.first.step.op)
    mine, theirs = kind.weighting.factor, other.weighting.factor
    if mine is None and theirs is None:
        return
    if mine is None or theirs is None or mine.weights is not theirs.weights:
        raise Refusal("some experts of the loop are weighted with other tensors", kind.first.step.op)
    if mine.gather is not None and mine.gather.operands[0] in kind.own:
        raise Refusal("the experts of the loop are weighted with different tensors", kind.first.step.op)
    if (mine.casts, mine.by_expert) != (theirs.casts, theirs.by_expert):
        raise Refusal("the experts of the loop cast their weights differently", kind.first.step.op)


def check_writes(graph: Graph, branches: Sequence[Branch]) -> None:
    """Refuse a loop into which something writes while it runs."""
    write = write_within(graph, {op for b in branches for op in (*b.ops, *b.step.own, b.step.op)})
    if write is not None:
        raise Refusal(f"{write.attrs.get('target', write.name)} writes to memory of the loop while it runs", write)
