"""Generates text with a fixed-size cache: the decode step is one compiled graph that runs ``moec::experts``.

python -m examples.generate
"""

from __future__ import annotations

import torch

import moec
from examples.factory import olmoe


def generate(tokens: int = 8, inner: str = "inductor") -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuations of one prompt, [1, prompt + tokens]: the compiled model's and the eager model's."""
    model, _, inputs = olmoe()
    model.eval()
    settings = {"max_new_tokens": tokens, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = model.generate(inputs["input_ids"], **settings)
    with moec.recording() as report:
        model.forward = torch.compile(model.forward, backend="moec", options={"inner": inner})
        got = model.generate(inputs["input_ids"], **settings)
    print(report)
    return got, expected


if __name__ == "__main__":
    got, expected = generate()
    print("compiled:", got[0].tolist())
    print("eager:   ", expected[0].tolist())
