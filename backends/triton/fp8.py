"""Which GPUs multiply f8e4m3fn, and why others do not."""

from __future__ import annotations

import torch

from moec.backends.triton.launcher import target_of
from moec.backends.triton.launches.device import is_gpu

_FIRST = 89
"""The first of NVIDIA's architectures whose matrix instructions take f8e4m3fn."""


def refusal(device: str, target: str) -> str:
    """Why weights in f8e4m3fn are not multiplied there; empty where they are.

    Args:
        device: Of the operands, as their types name it.
        target: What is compiled for; a GPU that the operands are on goes before it.
    """
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    name = (target_of(torch.device(device)) if on_gpu else "") or target.partition(",")[0]
    if not is_gpu(name):
        return ""
    kind, _, arch = name.partition(":")
    if kind == "hip":
        return f"its weights are f8e4m3fn, and {arch} is not known to multiply that (gfx942 has f8e4m3fnuz)"
    if arch.startswith("sm") and arch[2:].isdigit() and int(arch[2:]) < _FIRST:
        return f"its weights are f8e4m3fn, and {arch} has no matrix instructions for fp8 (sm{_FIRST} is the first)"
    return ""
