"""``moec::regroup``: which tokens of several micro-batches run together, as an op of a compiled graph.

It carries its program as ``moec::route`` does. Its results are indices: they have no gradient, and their sizes follow
from those of its inputs, so nothing in the graph depends on what tokens chose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.ir.opdef import op_def
from moec.ir.ops.moe_regroup import Regroup
from moec.runtime import counters
from moec.runtime.programs import lookup

_LIB = torch.library.Library("moec", "FRAGMENT")
_LIB.define("regroup(Tensor[] ids, str program) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))


def _regroup(ids: list[Tensor], program: str) -> list[Tensor]:
    prog = lookup(program)
    counters.count("moec::regroup", prog.label)
    return prog.kernel().forward(list(ids))


def _fake(ids: list[Tensor], program: str) -> list[Tensor]:
    op = lookup(program).op
    definition = op_def(op.name)
    assert isinstance(definition, Regroup)
    given = [t.shape[0] for t in ids]
    parts = definition.attr(op, "parts")
    there = definition.part_sizes(given[0], parts) if parts else given
    return [ids[0].new_empty((size,), dtype=torch.int64) for size in (*there, *given)]


_LIB.impl("regroup", _regroup, "CompositeExplicitAutograd")
torch.library.register_fake("moec::regroup", _fake, lib=_LIB)
