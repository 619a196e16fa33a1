"""JetMoE's mixture of MLPs (transformers' ``JetMoeMoE``): stacked matrices, rows split by counts kept in Python."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moec.readiness.rewriters import jetmoe_gating
from moec.readiness.rewriters.canonical import Projection, experts
from moec.readiness.rewriters.known import Rewriter


def forward(self: Any, layer_input: Tensor) -> Tensor:
    """``[B, S, H]`` to ``[B, S, H]``."""
    x = layer_input.reshape(-1, layer_input.shape[-1])
    ids, _, weights, _, _ = self.router(x)

    def activation(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return self.activation(gate) * up

    up, down = Projection([self.input_linear.weight]), Projection([self.output_linear.weight])
    y = experts(x, ids, weights, self.router.num_experts, [up], activation, down)
    return y.view(layer_input.shape) + self.bias


REWRITER = Rewriter(
    target="transformers.models.jetmoe.modeling_jetmoe.JetMoeMoE",
    how="grouped GEMMs on its stacked weights",
    methods={"forward": forward, "router.forward": jetmoe_gating.forward},
    sources={"JetMoeMoE.forward": "82e21fece6633508", **jetmoe_gating.SOURCES},
    parts=jetmoe_gating.PARTS,
)
