"""One number in a shared library: how many bytes of weights it maps.

AOTInductor writes it when it serialises the weights. Here the code is compiled before any weight is in memory, so that
a model larger than memory compiles, and the number is put in afterwards.
"""

from __future__ import annotations

import struct
from pathlib import Path

from moec.ir.errors import MoecError

SYMBOL = b"_binary_constants_bin_start"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_ENTRY = struct.Struct("<IBBHQQ")
_DYNSYM, _SYMTAB = 11, 2


class ElfError(MoecError):
    """A library that is not as this torch was seen to make it."""

    code = "aot-inductor"


def set_weight_bytes(library: Path, size: int) -> None:
    """Write ``size`` where the library keeps the bytes of its weights.

    Raises:
        ElfError: The place is not found.
    """
    data = bytearray(library.read_bytes())
    place = _place(data)
    if place is None or place + 8 > len(data):
        raise ElfError("the library that AOTInductor made does not say where its weights are", hint="use torch 2.13")
    data[place : place + 8] = struct.pack("<q", size)
    library.write_bytes(data)


def _place(data: bytearray) -> int | None:
    """Offset of the symbol's bytes in the file."""
    if data[:6] != b"\x7fELF\x02\x01":
        return None
    _, _, _, _, _, _, table, _, _, _, _, size, count, _ = _HEADER.unpack_from(data)
    sections = [_SECTION.unpack_from(data, table + i * size) for i in range(count)]
    for _, kind, _, _, offset, length, link, _, _, entry in sections:
        if kind not in (_SYMTAB, _DYNSYM):
            continue
        names = sections[link][4]
        for at in range(offset, offset + length, entry):
            name, _, _, section, value, _ = _ENTRY.unpack_from(data, at)
            start = names + name
            if data[start : start + len(SYMBOL) + 1] == SYMBOL + b"\0" and section < count:
                return int(value - sections[section][3] + sections[section][4])
    return None
