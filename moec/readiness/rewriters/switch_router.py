"""Switch Transformers' router without its cast: its own forward casts the classifier module anew in every call.

That does nothing from the second call on, but no exported program can hold it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, S, H]`` to one-hot choices ``[B, S, E]``, their probabilities ``[B, S, 1]`` and the logits."""
    if self.classifier.weight.dtype != self.dtype or (self.training and self.jitter_noise > 0):
        return type(self).forward(self, hidden_states)  # to be cast for good, or with random numbers
    logits = self.classifier(hidden_states.to(self.dtype))
    probs = torch.softmax(logits, dim=-1, dtype=self.dtype).to(hidden_states.dtype)
    choice = torch.nn.functional.one_hot(torch.argmax(probs, dim=-1), num_classes=self.num_experts)
    within = torch.cumsum(choice, dim=-2) <= self.expert_capacity
    return choice * within, probs.max(dim=-1).values.unsqueeze(-1), logits
