"""Weights that stay in the files of a checkpoint: referenced by path, hash and offset, never rewritten."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from moec.aot.checkpoint import Stored
from moec.aot.code import Constant
from moec.aot.errors import AotError
from moec.artifact import manifest as m
from moec.artifact.archive import file_hash
from moec.artifact.weights import DTYPES, known_hash, remember


class FileTable:
    """The files that an artifact refers to.

    Args:
        folder: Of the artifact: paths are relative to it.
        told: Hears which file is hashed.

    Attributes:
        files: By the key that tensors name.
    """

    def __init__(self, folder: Path, told: Callable[[str], None]) -> None:
        self.files: dict[str, m.File] = {}
        self._folder, self._told = folder, told

    def key(self, path: Path) -> str:
        """The key of a file; it is hashed when it is first met."""
        relative = os.path.relpath(path.resolve(), self._folder.resolve())
        if relative not in self.files:
            self._told(path.name)
            digest = known_hash(path) or file_hash(path)
            remember(path, digest)
            self.files[relative] = m.File("", relative, path.stat().st_size, digest)
        return relative


def put_tensor(weights: m.Weights, key: str, constant: Constant, places: Sequence[Stored], files: FileTable) -> None:
    """Enter a weight that lies in a checkpoint: as the tensor it is, or as a table of its experts' addresses.

    Raises:
        AotError: The code takes it in another form than it has on disk.
    """
    if len(places) > 1:
        if constant.dtype != "i64" or constant.shape != (len(places),):
            raise AotError(
                f"the experts of {key!r} lie one by one, and its layer was not fused", hint="use --weights inside"
            )
        addresses = tuple(f"{files.key(p.file)}@{p.offset}" for p in places)
        weights.tables[key] = m.Table(addresses, places[0].size)
        return
    (place,) = places
    expected = _contiguous(constant.shape)
    if place.dtype != constant.dtype or place.shape != constant.shape or constant.stride != expected:
        raise AotError(f"the weight {key!r} lies in another form than the code takes it", hint="use --weights inside")
    if place.offset % DTYPES[place.dtype].itemsize:
        raise AotError(f"{place.file}: {key!r} begins in the middle of an element", hint="save the model again")
    weights.tensors[key] = m.Tensor(
        constant.dtype, constant.shape, constant.stride, files.key(place.file), place.offset, place.size
    )


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
