"""DBRX (transformers' ``DbrxExperts``): three matrices hold all experts, one under the other, and are seen as stacked.

The router, with its p-norm and its jitter while training, stays the model's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moec.readiness.rewriters.canonical import Projection, experts
from moec.readiness.rewriters.known import Rewriter


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """x ``[B, S, H]``, ids and weights ``[B*S, k]`` to ``[B, S, H]``."""
    mlp = self.mlp
    stacked = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
    gate, up, down = mlp.w1.view(stacked), mlp.v1.view(stacked), mlp.w2.view(stacked)

    def activation(g: Tensor, u: Tensor) -> Tensor:
        return mlp.activation_fn(g) * u

    x = hidden_states.reshape(-1, self.hidden_size)
    y = experts(
        x,
        top_k_index,
        top_k_weights,
        self.num_experts,
        [Projection([gate]), Projection([up])],
        activation,
        Projection([down], inputs_first=True),
    )
    return y.view(hidden_states.shape[0], -1, self.hidden_size)


REWRITER = Rewriter(
    target="transformers.models.dbrx.modeling_dbrx.DbrxExperts",
    how="grouped GEMMs on its matrices seen as stacked",
    methods={"forward": forward},
    sources={"DbrxExperts.forward": "7dbe621552329a9c", "DbrxExpertGLU.forward": "6d1f5b40be277f9d"},
    parts={"mlp": "DbrxExpertGLU"},
)
