"""Dense GEMMs of a library beside the kernels: what a layer of one expert could do instead.

With one expert that every token goes to, a layer is a dense MLP, and PyTorch's own GEMMs can run it. They use the best
instructions that the processor has, and kernels may be kept from those. With equal instructions both are assumed to be
equally good, and the kernel is taken.
"""

from __future__ import annotations

from functools import lru_cache

from moec.cost.layer import LayerShape, predict
from moec.cost.machine import MachineProfile
from moec.targets import detect_level

CLEARLY = 1.1
"""The library is taken where the kernel is predicted to take so many times as long."""
CALL_SECONDS = 30e-6
"""What the several calls of the library's way take beyond the kernel's one."""


def best_level() -> str:
    """The instruction set that a library uses on this processor."""
    return detect_level()


@lru_cache(maxsize=4096)
def library_is_faster(shape: LayerShape, tokens: int, machine: MachineProfile, threads: int, isa: str) -> bool:
    """Whether PyTorch's GEMMs clearly finish before the kernel does; never for more than one expert.

    Args:
        shape: The layer.
        tokens: Tokens of the call.
        machine: Measured or assumed profile.
        threads: Threads of the call.
        isa: Instruction set of the kernel.
    """
    best = best_level()
    if shape.experts != 1 or tokens < 1 or isa == best:
        return False
    kernel, library = (predict(shape, tokens, machine, threads, level).seconds for level in (isa, best))
    return kernel > CLEARLY * (library + CALL_SECONDS)
