"""Zips in zips, written in one go: Python's own reader finds everything whole, whatever the sizes."""

from __future__ import annotations

import hashlib
import io
import os
import random
import zipfile
import zlib
from pathlib import Path

import pytest

from moec.aot.behind import CHUNK, Behind
from moec.artifact import packing
from moec.artifact.crc import combined
from moec.artifact.packing import ALIGN, Pack


@pytest.mark.parametrize("sizes", [(0, 0), (0, 5), (5, 0), (1, 1), (7, 1000), (1000, 4099)])
def test_crc_of_two_texts(sizes: tuple[int, int]) -> None:
    first, second = (random.Random(size).randbytes(size) for size in sizes)
    assert combined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_crc_of_more_than_four_gigabytes() -> None:
    """Of zeros, by doubling: zlib itself says what 4 MiB are."""
    crc, size = zlib.crc32(bytes(1 << 22)), 1 << 22
    for _ in range(11):
        crc, size = combined(crc, crc, size), 2 * size
    want = 0
    for _ in range(8 << 30 >> 26):
        want = combined(want, zlib.crc32(bytes(1 << 26)), 1 << 26)
    assert size == 8 << 30 and crc == want


def packed(content: dict[str, bytes]) -> bytes:
    """A zip that holds ``content`` in a zip, with a member before and one behind."""
    to = io.BytesIO()
    outer = Pack(to)
    outer.add("before", b"1")
    with outer.pack("in.zip") as inner:
        for name, data in content.items():
            with inner.member(name) as member:
                for at in range(0, len(data), 1000):
                    member.write(memoryview(data)[at : at + 1000])
        inner.finish()
    outer.add("behind/ü", b"")
    outer.finish()
    assert outer.size == len(to.getvalue()) and outer.crc == zlib.crc32(to.getvalue())
    return to.getvalue()


@pytest.mark.parametrize("limit", [packing.LIMIT, 1])
def test_zips_in_zips(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the least limit every number stands where those of large files stand."""
    monkeypatch.setattr(packing, "LIMIT", limit)
    content = {"a": random.Random(0).randbytes(123_456), "b/c": b"", "d": b"x" * ALIGN}
    made = packed(content)
    assert packed(content) == made
    with zipfile.ZipFile(io.BytesIO(made)) as outer:
        assert outer.testzip() is None
        assert outer.namelist() == ["before", "in.zip", "behind/ü"]
        assert outer.read("before") == b"1"
        with zipfile.ZipFile(io.BytesIO(outer.read("in.zip"))) as inner:
            assert inner.testzip() is None
            assert {n: inner.read(n) for n in inner.namelist()} == content
    for data in (content["a"], content["d"]):
        assert made.index(data) % ALIGN == 0


def test_a_damaged_byte_is_noticed() -> None:
    """The checksum of the outer zip, which was put together, covers every byte of the inner."""
    whole = packed({"a": b"content"})
    for place in (whole.index(b"content"), whole.rindex(b"PK\1\2", 0, whole.index(b"behind/"))):
        made = bytearray(whole)
        made[place + 1] ^= 1
        with zipfile.ZipFile(io.BytesIO(made)) as outer:
            assert outer.testzip() == "in.zip"


def test_hashed_behind(tmp_path: Path) -> None:
    sizes = [10_000] * 30 + [CHUNK - 1, 2 * CHUNK + 5, 0] + [1] * 3000 + [CHUNK]
    pieces = [random.Random(i).randbytes(size) for i, size in enumerate(sizes)]
    with Behind(tmp_path / "file") as file:
        file.write(b"before")
        with file.hashed() as digest:
            for piece in pieces:
                file.write(piece)
        file.write(b"behind")
    assert digest.hexdigest() == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert (tmp_path / "file").read_bytes() == b"before" + b"".join(pieces) + b"behind"


def test_chunks_are_written_where_they_are_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at, starts = 0, []

    def writev(file: int, views: list[memoryview]) -> int:
        nonlocal at
        starts.append(at)
        done = write(file, views[:-1] or views)  # as a system may that has been interrupted
        at += done
        return done

    write = os.writev
    monkeypatch.setattr(os, "writev", writev)
    with Behind(tmp_path / "file") as file:
        for size in (100, CHUNK, 3, 2 * CHUNK, CHUNK // 2):
            file.write(bytes([size % 251]) * size)
    assert set(range(0, at, CHUNK)) <= set(starts) and at == (tmp_path / "file").stat().st_size
    assert at == 103 + 3 * CHUNK + CHUNK // 2


def test_errors_of_writing_come_out() -> None:
    def fill() -> None:
        with Behind(Path("/dev/full")) as file:
            for _ in range(20):
                file.write(bytes(1000))

    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    with pytest.raises(OSError, match="No space left"):
        fill()
    with pytest.raises(OSError, match="No space left"), Behind(Path("/dev/full")) as file:
        file.write(b"told when it is closed")
