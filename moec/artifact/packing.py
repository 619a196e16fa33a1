"""Writes zips of stored members that begin at pages; every byte is checksummed once, even where a zip is in a zip.

Python's ``zipfile`` would checksum a member when it goes into the inner zip, and again when that goes into the outer.
The format is that of PKWARE's APPNOTE 6.3: with sizes behind the members, so that nothing is written twice.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moec.artifact.crc import combined

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

ALIGN = 4096
"""Bytes: members begin at a page, so that tensors in them are aligned wherever they are mapped."""
LIMIT = 0xFFFFFFFF
"""From here on a number stands in a field of 64 bits."""
_LOCAL = struct.Struct("<4s5H3I2H")
_BEHIND = struct.Struct("<4sIQQ")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_VERSION, _UNIX = 45, 3 << 8
_SIZES_BEHIND, _UTF8 = 0x8, 0x800
_DATE = 1 << 5 | 1  # the first of January 1980: equal content is an equal file
_MODE = 0o100644 << 16
_WIDE = 0xFFFFFFFF  # in a field of 32 bits: look into that of 64
_WIDE_ID, _PADDING_ID = 1, 0xD935  # fields of 64 bits; what Android's zipalign pads with


class Stream(Protocol):
    """Where bytes go, in order."""

    def write(self, data: ReadableBuffer, /) -> int: ...


@dataclass
class Packed:
    """A member: where its header is, and what was written."""

    name: bytes
    header: int
    size: int = 0
    crc: int = 0


class Member:
    """What is written to it becomes the member's content."""

    def __init__(self, to: Stream, packed: Packed) -> None:
        self._to, self._packed = to, packed

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of ``data``."""
        view = memoryview(data)
        self._packed.crc = zlib.crc32(view, self._packed.crc)
        self._packed.size += view.nbytes
        self._to.write(view)
        return view.nbytes


class Pack:
    """A zip that is being written; ``finish`` ends it.

    Args:
        to: Where it goes, from a page boundary on.

    Attributes:
        size: Bytes written so far.
        crc: CRC-32 of them.
    """

    def __init__(self, to: Stream) -> None:
        self.size = self.crc = 0
        self._to = to
        self._members: list[Packed] = []

    def add(self, name: str, data: bytes) -> None:
        """A member of this content."""
        with self.member(name) as member:
            member.write(data)

    @contextmanager
    def member(self, name: str) -> Iterator[Member]:
        """A member to write to."""
        packed = self._begin(name)
        yield Member(self._to, packed)
        self._end(packed)

    @contextmanager
    def pack(self, name: str) -> Iterator[Pack]:
        """A member that is a zip itself, which whoever writes it must finish."""
        packed = self._begin(name)
        inner = Pack(self._to)
        yield inner
        packed.size, packed.crc = inner.size, inner.crc
        self._end(packed)

    def finish(self) -> None:
        """Write the directory."""
        start = self.size
        for m in self._members:
            self._write(_central(m))
        size, count = self.size - start, len(self._members)
        if max(start, size) >= LIMIT or count >= 0xFFFF:
            end, sizes = self.size, (0, 0, count, count, size, start)
            self._write(_END64.pack(b"PK\6\6", _END64.size - 12, _UNIX | _VERSION, _VERSION, *sizes))
            self._write(_LOCATOR64.pack(b"PK\6\7", 0, end, 1))
        few = min(count, 0xFFFF)
        self._write(_END.pack(b"PK\5\6", 0, 0, few, few, _narrow(size), _narrow(start), 0))

    def _write(self, data: bytes) -> None:
        self.crc = zlib.crc32(data, self.crc)
        self.size += len(data)
        self._to.write(data)

    def _begin(self, name: str) -> Packed:
        packed = Packed(name.encode(), self.size)
        wide = struct.pack("<HHQQ", _WIDE_ID, 16, 0, 0)
        start = self.size + _LOCAL.size + len(packed.name) + len(wide) + 4
        padding = -start % ALIGN
        extra = wide + struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
        fields = (_VERSION, _flags(packed.name), 0, 0, _DATE, 0, _WIDE, _WIDE, len(packed.name), len(extra))
        self._write(_LOCAL.pack(b"PK\3\4", *fields) + packed.name + extra)
        return packed

    def _end(self, packed: Packed) -> None:
        self.crc = combined(self.crc, packed.crc, packed.size)
        self.size += packed.size
        self._write(_BEHIND.pack(b"PK\7\10", packed.crc, packed.size, packed.size))
        self._members.append(packed)


def _central(m: Packed) -> bytes:
    """A member's entry in the directory."""
    wide = [n for n in (m.size, m.size, m.header) if n >= LIMIT]
    extra = struct.pack(f"<HH{len(wide)}Q", _WIDE_ID, 8 * len(wide), *wide) if wide else b""
    first = (_UNIX | _VERSION, _VERSION, _flags(m.name), 0, 0, _DATE)
    second = (m.crc, _narrow(m.size), _narrow(m.size), len(m.name), len(extra), 0, 0, 0, _MODE, _narrow(m.header))
    return _CENTRAL.pack(b"PK\1\2", *first, *second) + m.name + extra


def _flags(name: bytes) -> int:
    return _SIZES_BEHIND | (0 if name.isascii() else _UTF8)


def _narrow(size: int) -> int:
    return size if size < LIMIT else _WIDE
