"""Trains a small MoE model through moec: the forward and the backward run ``moec::experts``.

python -m examples.train
"""

from __future__ import annotations

import torch

from examples.factory import olmoe


def train(steps: int = 5, inner: str = "inductor") -> list[float]:
    """Losses of a few steps on one sequence; they fall, since the model learns it by heart."""
    model, _, inputs = olmoe()
    compiled = torch.compile(model, backend="moec", options={"inner": inner})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = compiled(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for step, loss in enumerate(train()):
        print(f"step {step}: loss {loss:.3f}")
