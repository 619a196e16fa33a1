"""The instruction sets that a target declares: kernels for each of them are embedded, and the best one runs."""

from __future__ import annotations

from dataclasses import dataclass

from moec.backends.cpu.isa import LEVELS, Isa
from moec.targets import TargetError, parse_target


@dataclass(frozen=True)
class Lowest:
    """What everything in an artifact may use that is not dispatched.

    Attributes:
        march: g++'s name of the architecture.
        vector_bits: Of the vectors that Inductor's kernels may use.
        note: Bits of the x86-64 psABI's levels that the loader must find (1 baseline, 2 v2, 4 v3, 8 v4).
    """

    march: str
    vector_bits: int
    note: int


_V3, _V4 = Lowest("x86-64-v3", 256, 7), Lowest("x86-64-v4", 512, 15)


def declared(target: str) -> tuple[Isa, ...]:
    """The levels of ``target``, the lowest first: ``cpu`` is all, ``cpu:avx512`` that one and what is above.

    Raises:
        TargetError: The target is no x86 CPU.
    """
    name = parse_target(target).name
    levels = list(LEVELS.values())
    if name == "cpu":
        return tuple(levels)
    kind, _, level = name.partition(":")
    if kind != "cpu" or level not in LEVELS:
        raise TargetError(
            f"there is no ahead-of-time code for target {target!r}",
            hint="targets: cpu, "
            + ", ".join(f"cpu:{n}" for n in LEVELS)
            + "; cuda:sm80, cuda:sm90, cuda:sm100, hip:gfx942",
        )
    return tuple(levels[list(LEVELS).index(level) :])


def lowest(target: str) -> Lowest:
    """What code that is built once may use on every processor of ``target``."""
    return _V3 if declared(target)[0].name == "avx2" else _V4


def different(levels: tuple[Isa, ...], bf16: bool) -> tuple[Isa, ...]:
    """Those of ``levels`` that make different kernels: the higher ones multiply bf16 alone, so others skip them."""
    if bf16:
        return levels
    plain = tuple(isa for isa in levels if isa.name in ("avx2", "avx512"))
    return plain or levels[:1]
