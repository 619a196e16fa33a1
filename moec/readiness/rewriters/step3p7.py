"""Step-3.7 (transformers' ``Step3p7Experts``): stacked experts with a clamped SwiGLU, run one after another."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moec.readiness.rewriters.canonical import Projection, experts
from moec.readiness.rewriters.known import Rewriter


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """x ``[T, H]``, ids and weights ``[T, k]`` to ``[T, H]``."""
    up, down = Projection([self.gate_up_proj]), Projection([self.down_proj])
    return experts(hidden_states, top_k_index, top_k_weights, self.num_experts, [up], self._apply_gate, down)


REWRITER = Rewriter(
    target="transformers.models.step3p7.modeling_step3p7.Step3p7Experts",
    how="grouped GEMMs on its stacked weights",
    methods={"forward": forward},
    sources={"Step3p7Experts.forward": "728a89170feb8843"},
)
