"""Weights as the code maps them: one tensor after the other, each from a multiple of 64 bytes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO

import torch
from torch import Tensor

from moec.aot.code import Constant
from moec.aot.errors import AotError
from moec.artifact.weights import DTYPES

_CHUNK = 16 << 20


def write_blob(to: IO[bytes], constants: Sequence[Constant], state: Mapping[str, Tensor]) -> None:
    """Write the constants in their order; one tensor's chunk is in memory besides the tensors themselves.

    Raises:
        AotError: A constant has no value, or one of another shape.
    """
    for constant in constants:
        value = state.get(constant.name)
        if value is None:
            raise AotError(f"the code takes a constant {constant.name!r} that the model does not have")
        if tuple(value.shape) != constant.shape:
            raise AotError(f"{constant.name!r} is {list(value.shape)}, the code takes {list(constant.shape)}")
        written = 0
        for piece in _bytes(value.detach(), constant):
            to.write(piece)
            written += len(piece)
        to.write(bytes(constant.size - written))


def _bytes(value: Tensor, constant: Constant) -> list[memoryview]:
    dtype = DTYPES[constant.dtype]
    if not value.numel():
        return []
    if value.dtype != dtype or tuple(value.stride()) != constant.stride:
        value = torch.empty_strided(constant.shape, constant.stride, dtype=dtype).copy_(value)
    last = sum((n - 1) * s for n, s in zip(constant.shape, constant.stride, strict=True))
    flat = value.as_strided((last + 1,), (1,)).view(torch.uint8)
    return [flat[at : at + _CHUNK].numpy().data for at in range(0, flat.numel(), _CHUNK)]
