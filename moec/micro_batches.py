"""Micro-batches for passes that look at several at once: blocks of one layer go through the pipeline as one slice.

The contract:
1. Blocks are joined where such a pass then does something. Else they are compiled one by one, and nothing has moved.
2. Why it did nothing, or was given nothing, stands in the report of each of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch.fx import GraphModule, Node

from moec.options import CompileOptions
from moec.passes.base import Remark
from moec.pipeline import passes_of
from moec.slicing import NotSliced, Slice, find_slices
from moec.slicing import nodes as fx_nodes
from moec.slicing.cut import Refused, View
from moec.slicing.together import join, same_weights, waiting

Pieces = Sequence[Slice | NotSliced]


class Compiled(Protocol):
    """What is asked of a slice that was compiled."""

    @property
    def fused(self) -> bool: ...

    @property
    def remarks(self) -> list[Remark]: ...


@dataclass
class Together:
    """The blocks of a graph, micro-batches joined.

    Attributes:
        pieces: As :func:`moec.slicing.find_slices` finds them, but for joined slices.
        remarks: What passes that look at several micro-batches said, by the anchors of blocks that stand alone.
        passes: Names of these passes.
    """

    pieces: Pieces
    remarks: dict[Node, list[str]] = field(default_factory=dict)
    passes: frozenset[str] = frozenset()

    def remarks_of(self, anchor: Node, said: Sequence[Remark]) -> list[str]:
        """What is to be told of a block: what was ``said`` of it alone, but for what was said of several."""
        instead = self.remarks.get(anchor)
        if instead is None:
            return [str(r) for r in said]
        return [*(str(r) for r in said if r.pass_name not in self.passes), *instead]


def bring_together(gm: GraphModule, options: CompileOptions, compile: Callable[[Slice], Compiled]) -> Together:
    """Find the blocks of a graph, and join those that a pass wants to see together. Moves nodes of the graph.

    Args:
        gm: The graph.
        options: The caller's options.
        compile: Runs the pipeline on a slice.
    """
    pieces = find_slices(gm.graph)
    groups = (n.args[2] for n in gm.graph.nodes if fx_nodes.name(n) == "unshard")
    wanting = {p.name: p.micro_batches for p in passes_of(options, map(str, groups)) if p.micro_batches > 1}
    if not wanting:
        return Together(pieces)
    found, count = Together(pieces, passes=frozenset(wanting)), max(wanting.values())
    joined: list[list[Node]] = []
    layers = same_weights(pieces)
    for blocks in layers:
        while len(blocks) >= count:
            parts = blocks[:count]
            try:
                _try(gm, parts, compile, found)
            except _Apart as reason:
                found.remarks[blocks.pop(0).anchor] = reason.remarks
                continue
            joined.append([part.anchor for part in parts])
            del blocks[:count]
    if layers:  # the graph has changed: what was cut out of it before may not hold any more
        found.pieces = _joined(View(gm.graph), find_slices(gm.graph), joined)
    return found


class _Apart(Exception):
    """Blocks stay apart."""

    def __init__(self, remarks: list[str]) -> None:
        self.remarks = remarks


def _try(gm: GraphModule, parts: list[Slice], compile: Callable[[Slice], Compiled], found: Together) -> None:
    """Move what stands between ``parts`` if a pass does something with all of them.

    Raises:
        _Apart: None does, or they cannot be brought together.
    """
    view = View(gm.graph)
    try:
        moved = waiting(view, parts)
        whole = join(view, parts, frozenset(moved))
    except Refused as reason:
        raise _Apart([f"missed: {name}: {reason}" for name in sorted(found.passes)]) from reason
    compiled = compile(whole)
    remarks = [r for r in compiled.remarks if r.pass_name in found.passes]
    if not compiled.fused or not any(r.kind == "applied" for r in remarks):
        raise _Apart([str(r) for r in remarks if r.kind != "applied"])
    for node in reversed(moved):
        whole.end.append(node)


def _joined(view: View, pieces: Pieces, joined: list[list[Node]]) -> Pieces:
    """``pieces`` with those of each group in ``joined`` as one, where that still can be."""
    at = {piece.anchor: piece for piece in pieces}
    for anchors in joined:
        parts = [at[anchor] for anchor in anchors]
        slices = [part for part in parts if isinstance(part, Slice)]
        try:
            whole = join(view, slices) if len(slices) == len(parts) else None
        except Refused:
            continue
        if whole is not None:
            at[anchors[0]] = whole
            for anchor in anchors[1:]:
                del at[anchor]
    return list(at.values())
