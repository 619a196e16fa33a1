"""The layers that are measured: their sizes, their element types, and what one call of them costs at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.ir.errors import nearest

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """One layer of ``experts`` gated experts, of which a token goes to ``top_k``; widths in elements."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int

    def flops(self, tokens: int) -> int:
        """Operations of gate, up and down GEMM, a multiply-add counted as two."""
        return 6 * tokens * self.top_k * self.hidden * self.inner

    def weight_bytes(self, dtype: torch.dtype, experts: float | None = None) -> int:
        """Bytes of the weights of ``experts`` experts, of all of them by default."""
        count = self.experts if experts is None else experts
        return int(count * 3 * self.hidden * self.inner * dtype.itemsize)


#: Sizes as in the models' own config.json.
SHAPES = {
    s.name: s
    for s in (
        Shape("olmoe", 2048, 1024, 64, 8),
        Shape("qwen3-30b", 2048, 768, 128, 8),
        Shape("gpt-oss-20b", 2880, 2880, 32, 4),
        Shape("mixtral-8x7b", 4096, 14336, 8, 2),
        Shape("deepseek-v2-lite", 2048, 1408, 64, 6),
    )
}


def parse_shapes(text: str) -> list[Shape]:
    """Shapes of a comma-separated list of names or ``H:I:E:k``; ``all`` is every name.

    Raises:
        SystemExit: A name that is not known, or sizes that make no layer.
    """
    if text == "all":
        return list(SHAPES.values())
    return [_shape(name.strip()) for name in text.split(",")]


def _shape(name: str) -> Shape:
    if name in SHAPES:
        return SHAPES[name]
    numbers = name.split(":")
    if len(numbers) == 4 and all(n.isdigit() and int(n) > 0 for n in numbers):
        shape = Shape(name, *(int(n) for n in numbers))
        if shape.top_k <= shape.experts:
            return shape
        raise SystemExit(f"{name}: a token cannot go to {shape.top_k} of {shape.experts} experts")
    raise SystemExit(f"unknown shape {name!r}; {nearest(name, SHAPES)} (or all, or H:I:E:k)")


def parse_tokens(text: str) -> list[int]:
    """Token counts of a comma-separated list.

    Raises:
        SystemExit: Something that is no count.
    """
    counts = [n.strip() for n in text.split(",")]
    if not all(n.isdigit() and int(n) > 0 for n in counts):
        raise SystemExit(f"--tokens {text}: give counts from 1 up, separated by commas")
    return [int(n) for n in counts]
