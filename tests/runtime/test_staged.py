"""Layers in pieces: what is handed on is used once, and results are asked for at the end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moec.ir.errors import MoecError
from moec.ir.parser import parse_graph
from moec.ir.staged import Staged, stops
from moec.runtime import staged

TEXT = """
graph @pieces(%x: f32[T, 2]) -> f32[T, 2] {
  %t = comm.all_to_all.start %x {group = "ep", ranks = 1} : !comm.token
  %y = comm.wait %t : f32[T, 2]
  %u = comm.all_to_all.start %y {group = "ep", ranks = 1} : !comm.token
  %z = comm.wait %u : f32[T, 2]
  return %z
}
"""


class Alone:
    """A world of one rank, in which nothing travels."""

    def size(self, group: str) -> int:
        return 1

    def rank(self, group: str) -> int:
        return 0


def begun(x: Tensor) -> Tensor:
    """A layer under way that waits twice; each op adds one to what it hands on."""
    from moec.ir.comm_semantics import running_in

    region = parse_graph(TEXT)
    assert stops(region) == (1, 3)
    with running_in(Alone()):  # type: ignore[arg-type]
        return staged.keep(Staged(region, [x], stops(region), lambda op, values: [values[0] + 1]), [x])


def test_pieces_one_after_the_other() -> None:
    x = torch.zeros(3, 2)
    layer = torch.ops.moec.resume_layer(begun(x))
    (found,) = torch.ops.moec.end_layer(layer, [x], "")
    assert torch.equal(found, torch.full((3, 2), 4.0)) and staged.under_way() == 0
    with pytest.raises(MoecError, match="is not under way"):
        torch.ops.moec.resume_layer(layer)


def test_results_are_asked_for_at_the_end_alone() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(MoecError, match="under way still"):
        torch.ops.moec.end_layer(begun(x), [x], "")
    layer = torch.ops.moec.resume_layer(begun(x))
    with pytest.raises(MoecError, match="at its end"):
        torch.ops.moec.resume_layer(layer)
