"""Llama 4 (transformers' ``Llama4TextMoe``): sigmoid scores scale what goes into an expert, not what comes out.

As written, every token goes through every expert, multiplied by a score that is 0 for the experts that were not chosen.
A row of zeros comes out of an expert as zeros: no projection has a bias, and ``up · act(gate)`` is ``0 · act(0)``. So
only the chosen pairs of token and expert are run. Scaled rows differ between the experts of a token, so each is a token
of its own with one expert and weight 1, and a token's k results are added afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.readiness.rewriters.canonical import Projection, experts
from moec.readiness.rewriters.known import Rewriter


def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """``[.., H]`` to ``[T, H]`` and the router's logits ``[T, E]``."""
    x = hidden_states.reshape(-1, self.hidden_dim)
    _, logits = self.router(x)
    top_k, weights = self.router.top_k, self.experts
    best, ids = torch.topk(logits, top_k, dim=1)
    scores = torch.sigmoid(best.float()).to(logits.dtype)
    rows = (x.unsqueeze(1) * scores.unsqueeze(-1)).reshape(-1, self.hidden_dim)
    slots = ids.reshape(-1, 1)

    def activation(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return up * weights.act_fn(gate)

    routed = experts(
        rows,
        slots,
        torch.ones_like(slots, dtype=rows.dtype),
        self.num_experts,
        [Projection([weights.gate_up_proj], inputs_first=True)],
        activation,
        Projection([weights.down_proj], inputs_first=True),
    )
    routed = routed.view(x.shape[0], top_k, self.hidden_dim).sum(dim=1)
    shared = self.shared_expert(x)
    return shared + routed.to(shared.dtype), logits


REWRITER = Rewriter(
    target="transformers.models.llama4.modeling_llama4.Llama4TextMoe",
    how="runs the chosen experts alone, where its own forward runs all of them",
    methods={"forward": forward},
    sources={
        "Llama4TextMoe.forward": "ef071957853a5218",
        "Llama4TextExperts.forward": "99f2c3b9b8d86bc2",
        "Llama4Router.forward": "7de0aeefeea11514",
    },
    parts={"experts": "Llama4TextExperts", "router": "Llama4Router"},
)
