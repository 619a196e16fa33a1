"""Where the tensors of a checkpoint lie: read from the headers of safetensors files, without reading a tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moec.aot.errors import AotError
from moec.artifact.weights import DTYPES

_DTYPES = {
    "F64": ("f64", 8), "F32": ("f32", 4), "F16": ("f16", 2), "BF16": ("bf16", 2), "I64": ("i64", 8), "I32": ("i32", 4),
    "I16": ("i16", 2), "I8": ("i8", 1), "U8": ("u8", 1), "BOOL": ("bool", 1), "F8_E4M3": ("f8e4m3fn", 1),
    "F8_E5M2": ("f8e5m2", 1), "F8_E8M0": ("f8e8m0fnu", 1),
}  # fmt: skip
_MOST_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, contiguous; ``offset`` and ``size`` are bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model where they lie.

    Attributes:
        places: By the model's own names. One tensor for a weight that is one on disk; of stacked experts one for
            each, the gates of all before the ups.
        missing: Weights of the model that have no such place, and why.
        other: Those of them that lie there in another type.
    """

    places: Mapping[str, tuple[Stored, ...]]
    missing: Mapping[str, str]
    other: Mapping[str, tuple[Stored, ...]] = field(default_factory=dict)


def read_tensor(places: Sequence[Stored], shape: Sequence[int]) -> Tensor:
    """A weight of such a shape that lies there, in the type in which it does.

    Args:
        places: As in :class:`Checkpoint`.
        shape: Of the weight: ``[E, ..]`` where there is more than one place.
    """
    raw = torch.empty(sum(p.size for p in places), dtype=torch.uint8)
    to, at = raw.numpy().data, 0
    for place in in_order(places, shape[0] if len(places) > 1 else 1):
        with place.file.open("rb", buffering=0) as f:
            f.seek(place.offset)
            done = 0
            while done < place.size:
                count = f.readinto(to[at + done : at + place.size])
                if not count:
                    raise AotError(f"{place.file} was cut off while it was read")
                done += count
        at += place.size
    return raw.view(DTYPES[places[0].dtype]).view(*shape)


def in_order(places: Sequence[Stored], experts: int) -> list[Stored]:
    """Places in the order of a stacked weight's memory: expert by expert, its gate before its up."""
    parts = len(places) // experts
    return [places[part * experts + expert] for expert in range(experts) for part in range(parts)]


def read_headers(files: Iterable[Path]) -> dict[str, Stored]:
    """All tensors in ``files`` by name.

    Raises:
        AotError: A file is no safetensors file, is cut off, or describes tensors outside of itself.
    """
    found: dict[str, Stored] = {}
    for file in files:
        found |= _header(file)
    return found


def _header(file: Path) -> dict[str, Stored]:
    try:
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if not 2 <= size <= _MOST_HEADER_BYTES:
                raise AotError(f"{file} is no safetensors file")
            text = f.read(size)
        tree = json.loads(text)
        whole = file.stat().st_size
    except OSError as error:
        raise AotError(f"{file} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AotError(f"{file} is no safetensors file, or is cut off") from error
    if not isinstance(tree, dict):
        raise AotError(f"{file} is no safetensors file")
    found = {}
    for name, fields in tree.items():
        if name == "__metadata__":
            continue
        try:
            dtype, item = _DTYPES[fields["dtype"]]
            shape = tuple(int(n) for n in fields["shape"])
            start, stop = (int(n) for n in fields["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise AotError(f"{file}: the header does not describe {name!r} as moec knows tensors") from error
        begin = 8 + size + start
        if start < 0 or stop - start != math.prod(shape) * item or 8 + size + stop > whole:
            raise AotError(f"{file} is cut off: the tensor {name!r} lies outside of it", hint="copy the file again")
        found[name] = Stored(file, dtype, shape, begin, stop - start)
    return found
