"""JetMoE's router, rewritten for the two blocks that use it: ids and weights, where its own counts rows in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SOURCES = {
    "JetMoeTopKGating.forward": "6192400c511c0398",
    "JetMoeParallelExperts.forward": "257d9f97ebfa8fa6",
}
PARTS = {
    "router": "JetMoeTopKGating",
    "input_linear": "JetMoeParallelExperts",
    "output_linear": "JetMoeParallelExperts",
}


def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, None, Tensor, None, Tensor]:
    """x ``[T, H]`` to ids ``[T, k]``, weights ``[T, k]`` and logits ``[T, E]``.

    The logits are the fifth result, as in its own forward: there transformers records them.
    """
    logits = self.layer(hidden_states).float()
    best, ids = logits.topk(self.top_k, dim=1)
    return ids, None, torch.softmax(best, dim=1).type_as(hidden_states), None, logits
