"""Weights as the code maps them: one tensor after the other, each from a multiple of 64 bytes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from moec.aot.checkpoint import Stored, in_order
from moec.aot.code import Constant
from moec.aot.errors import AotError
from moec.aot.source import State
from moec.artifact.packing import Stream
from moec.artifact.weights import DTYPES
from moec.random_weights import MadeUp

_CHUNK = 4 << 20
ALIGN = 64
"""Bytes: of a constant's begin in the blob."""


def write_blob(
    to: Stream,
    constants: Sequence[Constant],
    state: State,
    places: Mapping[str, Sequence[Stored]] = MappingProxyType({}),
) -> None:
    """Write the constants in their order; a chunk of one is in memory besides the tensors of ``state``.

    Args:
        to: Where to.
        constants: As the code wants them.
        state: Values by name.
        places: Of values that lie in files: those of stacked experts one by one, all gates before all ups.

    Raises:
        AotError: A constant has no value, or one of another shape.
    """
    for constant in constants:
        if constant.name in places:
            _copy(to, constant, places[constant.name])
            continue
        value = state.get(constant.name)
        if value is None:
            raise AotError(f"the code takes a constant {constant.name!r} that the model does not have")
        if tuple(value.shape) != constant.shape:
            raise AotError(f"{constant.name!r} is {list(value.shape)}, the code takes {list(constant.shape)}")
        written = 0
        for piece in _bytes(value, constant):
            to.write(piece)
            written += len(piece)
        to.write(bytes(constant.size - written))


def _copy(to: Stream, constant: Constant, places: Sequence[Stored]) -> None:
    """Copy a constant from the files it lies in, expert by expert."""
    total = sum(p.size for p in places)
    if any(p.dtype != constant.dtype for p in places) or not total <= constant.size < total + ALIGN:
        raise AotError(f"{constant.name!r} lies in another form than the code takes it", hint="save the model again")
    for place in in_order(places, constant.shape[0] if len(places) > 1 else 1):
        with place.file.open("rb") as f:
            f.seek(place.offset)
            left = place.size
            while left:
                piece = f.read(min(left, _CHUNK))
                if not piece:
                    raise AotError(f"{place.file} was cut off while it was read")
                to.write(piece)
                left -= len(piece)
    to.write(bytes(constant.size - total))


def _bytes(value: Tensor | MadeUp, constant: Constant) -> Iterator[memoryview]:
    dtype = DTYPES[constant.dtype]
    if isinstance(value, MadeUp):
        rows = torch.empty(constant.shape, device="meta").stride()
        if value.block.dtype == dtype and rows == constant.stride:
            for part in value.pieces():
                yield from _pieces(part)
            return
        value = value.tensor()
    if not value.numel():
        return
    value = value.detach()
    if value.dtype != dtype or tuple(value.stride()) != constant.stride:
        value = torch.empty_strided(constant.shape, constant.stride, dtype=dtype).copy_(value)
    last = sum((n - 1) * s for n, s in zip(constant.shape, constant.stride, strict=True))
    yield from _pieces(value.as_strided((last + 1,), (1,)))


def _pieces(flat: Tensor) -> Iterator[memoryview]:
    raw = flat.view(torch.uint8)
    for at in range(0, raw.numel(), _CHUNK):
        yield raw[at : at + _CHUNK].numpy().data
