"""A generated Python file of kernels, and what a launcher or a compiler has to know of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Grid = Callable[[int, Mapping[str, int]], tuple[int, ...]]
"""The launch grid of a call from its number of tokens and the kernel's constants: static upper bounds, no data."""


@dataclass(frozen=True)
class Argument:
    """A run-time argument of a kernel. ``type`` is Triton's: ``*bf16``, ``i32``."""

    name: str
    type: str


@dataclass(frozen=True)
class Kernel:
    """One kernel of a file.

    Attributes:
        name: Of the function.
        arguments: Run-time arguments in order; the constants follow them.
        constants: Compile-time parameters (tile sizes).
        grid: Its launch grid.
    """

    name: str
    arguments: tuple[Argument, ...]
    constants: tuple[str, ...]
    grid: Grid


@dataclass(frozen=True)
class KernelFile:
    """The text of a Python file and its kernels by name."""

    text: str
    kernels: Mapping[str, Kernel]


COUNTS = frozenset({"slots_n", "chunks", "tokens", "rows_n"})
"""Arguments that change with the number of tokens: a kernel is not compiled again for other ones."""


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def function(kernel: Kernel, summary: str, body: Sequence[str]) -> str:
    """A kernel's text; ``body`` holds statements without their indent."""
    names = [a.name for a in kernel.arguments]
    names += [f"{c}: tl.constexpr" for c in kernel.constants]
    counts = [a.name for a in kernel.arguments if a.name in COUNTS]
    lines = [f"@triton.jit(do_not_specialize={counts})" if counts else "@triton.jit", f"def {kernel.name}("]
    lines += [f"    {name}," for name in names]
    lines += ["):", f'    """{summary}"""']
    lines += [f"    {line}" if line else "" for line in body]
    return "\n".join(lines) + "\n"


def helper(name: str, arguments: Sequence[str], constants: Sequence[str], summary: str, body: Sequence[str]) -> str:
    """The text of a function that kernels call; it becomes part of each of them."""
    names = [*arguments, *(f"{c}: tl.constexpr" for c in constants)]
    lines = ["@triton.jit", f"def {name}(", *(f"    {n}," for n in names), "):", f'    """{summary}"""']
    return "\n".join([*lines, *indented(body)]) + "\n"


def indented(lines: Sequence[str]) -> list[str]:
    """The lines one level deeper."""
    return [f"    {line}" if line else "" for line in lines]
