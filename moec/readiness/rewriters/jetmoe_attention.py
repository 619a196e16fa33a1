"""JetMoE's mixture of attention (transformers' ``JetMoeMoA``): an expert is a query and an output projection.

Attention lies between an expert's two projections, so this is no MoE MLP and no one op can be made of it. Its
projections become grouped GEMMs, which keeps it in the graph; they run as PyTorch runs them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moec.readiness.rewriters import jetmoe_gating
from moec.readiness.rewriters.canonical import inverse, sort_slots
from moec.readiness.rewriters.known import Rewriter
from moec.runtime.grouped_linear import grouped_linear

Topology = tuple[Tensor, Tensor, Tensor]
"""The order of the slots, where each expert's slots end, and the router's weights ``[T, k]``."""


def map(self: Any, layer_input: Tensor) -> tuple[Tensor, Tensor, Topology]:
    """``[B, S, H]`` to queries ``[B, S, k, D]``, the router's logits and what :func:`reduce` needs."""
    batch, length, width = layer_input.shape
    x = layer_input.reshape(-1, width)
    ids, _, weights, _, logits = self.router(x)
    order, offsets = sort_slots(ids.reshape(-1), self.num_experts)
    queries = grouped_linear(x[order // self.top_k], [self.input_linear.weight], offsets)
    queries = queries[inverse(order)].view(batch, length, self.top_k, self.hidden_size)
    return queries, logits, (order, offsets, weights)


def reduce(self: Any, layer_input: Tensor, topo_info: Topology) -> Tensor:
    """Attention's results ``[B, S, k, D]`` to ``[B, S, H]``."""
    order, offsets, weights = topo_info
    batch, length, top_k, width = layer_input.shape
    rows = layer_input.reshape(-1, width)[order]
    rows = grouped_linear(rows, [self.output_linear.weight], offsets) * weights.reshape(-1)[order].unsqueeze(-1)
    y = rows[inverse(order)].view(-1, top_k, self.input_size).sum(dim=1)
    return y.view(batch, length, self.input_size) + self.bias


REWRITER = Rewriter(
    target="transformers.models.jetmoe.modeling_jetmoe.JetMoeMoA",
    how="its two projections are grouped GEMMs; attention lies between them, so they are not fused",
    methods={"map": map, "reduce": reduce, "router.forward": jetmoe_gating.forward},
    sources={
        "JetMoeMoA.map": "2c19bd72cdf139ef",
        "JetMoeMoA.reduce": "70840b26af3aa745",
        **jetmoe_gating.SOURCES,
    },
    parts=jetmoe_gating.PARTS,
)
