"""The zip under an artifact: members are stored, so that they can be mapped; names are checked before anything is read.

Nothing is ever extracted under a name that the archive chose. Members are read by name, sizes and hashes are compared
with the manifest, and no byte of them is interpreted as code or pickle here.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from moec.artifact.errors import ArtifactError
from moec.artifact.manifest import Manifest, read_manifest
from moec.artifact.packing import ALIGN

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MANIFEST = "manifest.json"
MOST_MANIFEST_BYTES = 256 << 20
_CHUNK = 4 << 20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_PADDING_ID = 0xD935  # the extra field that Android's zipalign pads with
_ZIP64_BYTES = 20


@contextmanager
def aligned_member(archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    """A member to write to, stored, whose bytes begin at a multiple of ``ALIGN`` in the archive's file."""
    info = zipfile.ZipInfo(name)  # of a fixed date: equal content is an equal file
    info.compress_type = zipfile.ZIP_STORED
    info.external_attr = 0o644 << 16
    start = archive.start_dir + _LOCAL_HEADER.size + len(name.encode()) + _ZIP64_BYTES
    padding = -(start + 4) % ALIGN
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=True) as member:
        yield member


def hashed_copy(source: IO[bytes], to: IO[bytes]) -> tuple[int, str]:
    """Copy all that is left in ``source``; its size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        to.write(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Window(io.RawIOBase):
    """Part of a file, as a file: a stored member that can be searched without reading what lies between."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._at = path.open("rb", buffering=0), start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view) or 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class Archive:
    """An artifact's file, opened for reading and checked.

    Attributes:
        path: The artifact.
        manifest: What it says it holds.

    Raises:
        ArtifactError: On opening: no zip, names that lead elsewhere, no readable manifest, members that are missing,
            unknown or of another size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = _opened(path)
        try:
            names = [i.filename for i in self._zip.infolist()]
            for name in names:
                _check_name(name, path)
            if len(set(names)) < len(names):
                raise ArtifactError(f"{path} holds a member twice", hint=_AGAIN)
            self.manifest = self._read_manifest()
            self._check_members(set(names))
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def read(self, name: str) -> bytes:
        """A member, after its hash was compared.

        Raises:
            ArtifactError: Its bytes are not those that the manifest describes.
        """
        data = self._raw(name)
        if hashlib.sha256(data).hexdigest() != self.manifest.members[name].sha256:
            raise ArtifactError(f"{self.path}: {name} was changed: its content has another hash", hint=_AGAIN)
        return data

    def check(self, name: str) -> None:
        """Compare a member's hash without holding it in memory.

        Raises:
            ArtifactError: It differs.
        """
        with self.open_member(name) as f:
            digest = hashlib.file_digest(f, "sha256")
        if digest.hexdigest() != self.manifest.members[name].sha256:
            raise ArtifactError(f"{self.path}: {name} was changed: its content has another hash", hint=_AGAIN)

    def copy(self, name: str, to: Path) -> None:
        """Write a member to the file ``to``."""
        with self.open_member(name) as f, to.open("wb") as out:
            hashed_copy(f, out)

    def open_member(self, name: str) -> io.BufferedReader:
        """A member as a file that can be searched."""
        return io.BufferedReader(Window(self.path, self.offset(name), self.manifest.members[name].size), _CHUNK)

    def offset(self, name: str) -> int:
        """Where the bytes of a member begin in the artifact's file."""
        with self.path.open("rb") as f:
            return data_offset(f, self._zip.getinfo(name), 0)

    def _raw(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except (zipfile.BadZipFile, OSError, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
            raise ArtifactError(f"{self.path}: {name} cannot be read: {error}", hint=_AGAIN) from error

    def _read_manifest(self) -> Manifest:
        try:
            info = self._zip.getinfo(MANIFEST)
        except KeyError:
            raise ArtifactError(f"{self.path} is no moec artifact: it has no {MANIFEST}", hint=_IS) from None
        if info.file_size > MOST_MANIFEST_BYTES:
            raise ArtifactError(
                f"{self.path}: the manifest is larger than {MOST_MANIFEST_BYTES >> 20} MiB", hint=_AGAIN
            )
        try:
            text = self._raw(MANIFEST).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{self.path}: the manifest is no UTF-8 text", hint=_AGAIN) from error
        return read_manifest(text, str(self.path))

    def _check_members(self, names: set[str]) -> None:
        listed = self.manifest.members
        if missing := sorted(listed.keys() - names):
            raise ArtifactError(f"{self.path} lacks {missing[0]}, which its manifest lists", hint=_AGAIN)
        if extra := sorted(names - listed.keys() - {MANIFEST}):
            raise ArtifactError(f"{self.path} holds {extra[0]}, which its manifest does not list", hint=_AGAIN)
        for name, member in listed.items():
            info = self._zip.getinfo(name)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != member.size:
                raise ArtifactError(f"{self.path}: {name} was changed: it has another size", hint=_AGAIN)
        for blob in self.manifest.blobs:
            if blob.member not in listed:
                raise ArtifactError(f"{self.path}: the code for {blob.target} is no member: {blob.member}", hint=_AGAIN)


_AGAIN = "the file is damaged or was edited: copy it again, or compile the model again"
_IS = "moec compile MODEL -o out.moec makes one"


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise ArtifactError(f"there is no file {path}", hint=_IS) from None
    except zipfile.BadZipFile as error:
        with path.open("rb") as f:
            begins = f.read(4) == b"PK\x03\x04"
        if begins:
            raise ArtifactError(f"{path} is cut off: the end of the archive is missing", hint=_AGAIN) from error
        raise ArtifactError(f"{path} is no moec artifact", hint=_IS) from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error


def _check_name(name: str, path: Path) -> None:
    """Refuse names that would lead out of a folder, wherever they are extracted."""
    parts = PurePosixPath(name).parts
    bad = not name or name.startswith("/") or "\\" in name or ":" in name or "\0" in name
    if bad or ".." in parts or name.endswith("/") or str(PurePosixPath(name)) != name:
        raise ArtifactError(f"{path} is refused: its member {name!r} has a name that could lead elsewhere", hint=_IS)


def data_offset(file: IO[bytes], info: zipfile.ZipInfo, base: int) -> int:
    """Where a stored member's bytes begin in ``file``, whose archive begins at ``base``.

    Raises:
        ArtifactError: The local header is not where the directory says.
    """
    file.seek(base + info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise ArtifactError(f"the header of member {info.filename} is damaged", hint=_AGAIN)
    *_, name_size, extra_size = _LOCAL_HEADER.unpack(header)
    return base + info.header_offset + _LOCAL_HEADER.size + name_size + extra_size
