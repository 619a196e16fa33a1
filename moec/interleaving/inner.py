"""Where the graphs that autograd makes are got hold of: a pass of Inductor's, or the compilers of AOTAutograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from moec import __version__
from moec.interleaving.decide import Wanted
from moec.interleaving.graph import interleave, layers_of

CUSTOM_PASS = "post_grad_custom_post_pass"
"""Inductor's name of the place where the pass stands."""


class InterleavePass(CustomGraphPass):
    """Puts the graphs in order that are wanted; what it does is part of the key of Inductor's cache."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted

    def __call__(self, graph: Graph) -> None:
        backward = any(layer.backward for layer in layers_of(graph.nodes))
        if self.wanted.backward if backward else self.wanted.forward:
            interleave(graph)

    def uuid(self) -> Any:
        return "moec.interleaving", __version__, astuple(self.wanted)


def aot_eager(gm: GraphModule, inputs: Sequence[Any], wanted: Wanted) -> Callable[..., Any]:
    """As PyTorch's ``aot_eager``, with both graphs in order."""
    from torch._dynamo.backends.debugging import aot_eager as eager
    from torch._dynamo.backends.debugging import boxed_nop

    ordered = InterleavePass(wanted)

    def compiler(made: GraphModule, given: list[torch.Tensor]) -> Any:
        ordered(made.graph)
        made.recompile()
        return boxed_nop(made, given)

    return eager(gm, list(inputs), fw_compiler=compiler, bw_compiler=compiler)
