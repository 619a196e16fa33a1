"""Which sizes of the inputs may vary, and between what: the text of ``--dynamic``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.export import Dim

from moec.aot.errors import AotError

DEFAULT = "batch=1..64,seq=1..4096"
"""Of models that take tokens [batch, seq]."""
_PART = re.compile(r"([A-Za-z_]\w*)=(\d+)(?:\.\.(\d+))?\Z")
Ranges = dict[str, tuple[int, int]]


def parse_dynamic(text: str) -> Ranges:
    """``batch=1..64,seq=16``: least and largest value of every named dimension, in order.

    Raises:
        AotError: The text is not of this form, or a range is empty.
    """
    found: Ranges = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = _PART.match(part)
        if match is None:
            raise AotError(f"--dynamic cannot read {part!r}", hint=f"write name=low..high, such as {DEFAULT}")
        name, low, high = match[1], int(match[2]), int(match[3] or match[2])
        if low < 1 or high < low:
            raise AotError(f"--dynamic {part}: sizes go from 1 up, and the low end first")
        if name in found:
            raise AotError(f"--dynamic names {name!r} twice")
        found[name] = (low, high)
    return found


def example_size(span: tuple[int, int], wanted: int) -> int:
    """A size inside the range to trace with; not 1 where others are allowed, because 1 is traced as a special case."""
    low, high = span
    return min(max(low, wanted, 2), high)


def shapes(ranges: Ranges, inputs: Sequence[tuple[str, Any]]) -> dict[str, Any] | None:
    """Dynamic shapes of the inputs as ``torch.export`` takes them.

    Args:
        ranges: The first name is that of dimension 0, the second of dimension 1.
        inputs: Names and examples. A dimension varies where it has the size it has in the first tensor.

    Raises:
        AotError: An example does not have a size of the range, or no input has the dimension.
    """
    tensors = [value for _, value in inputs if isinstance(value, Tensor)]
    if not tensors or not ranges:
        return None
    first = tensors[0]
    dims: dict[int, Any] = {}
    for at, (name, (low, high)) in enumerate(ranges.items()):
        if at >= first.dim():
            raise AotError(f"--dynamic names {len(ranges)} dimensions, the first input has {first.dim()}")
        if not low <= first.shape[at] <= high:
            raise AotError(f"--dynamic {name}={low}..{high}: the example input has {first.shape[at]} there")
        if low < high:
            dims[at] = Dim(name, min=low, max=high)
    found: dict[str, Any] = {}
    for name, value in inputs:
        if isinstance(value, Tensor):
            same = {i: d for i, d in dims.items() if i < value.dim() and value.shape[i] == first.shape[i]}
            found[name] = same or None
        else:
            found[name] = None
    return found
