"""Weights of an artifact as tensors on the files' own pages: nothing is read before a kernel reads it."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import torch

from moec.artifact.archive import Archive, data_offset, file_hash
from moec.artifact.errors import ArtifactError
from moec.artifact.manifest import File, Manifest
from moec.cache import cache_dir, store

DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
    "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
    "f8e4m3fn": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2,
    "f8e8m0fnu": torch.float8_e8m0fnu,
}  # fmt: skip
"""Element types of tensors in a manifest."""
NAMES = {v: k for k, v in DTYPES.items()}


class Mapped:
    """The tensors of an artifact's weights.

    Args:
        archive: The artifact.

    Attributes:
        tensors: By name: what the code takes as constants.

    Raises:
        ArtifactError: There are none, a file beside the artifact is missing or another one, or a tensor lies outside of
            its file.
    """

    def __init__(self, archive: Archive) -> None:
        weights = archive.manifest.weights
        if weights.where == "none":
            raise ArtifactError(
                f"{archive.path} was compiled without weights", hint="compile the model again with --weights inside"
            )
        self._pages = {key: _pages(archive, file) for key, file in weights.files.items()}
        self.tensors: dict[str, torch.Tensor] = {}
        for name, t in weights.tensors.items():
            self.tensors[name] = self._view(name, t.file, t.offset, t.size, t.dtype, t.shape, t.stride)
        for name, table in weights.tables.items():
            at = [self._address(name, text, table.size) for text in table.addresses]
            self.tensors[name] = torch.tensor(at, dtype=torch.int64)

    def _slice(self, name: str, file: str, offset: int, size: int) -> torch.Tensor:
        pages = self._pages.get(file)
        if pages is None or offset < 0 or size < 0 or offset + size > pages.numel():
            raise ArtifactError(f"the manifest places the weight {name} outside of its file", hint="compile again")
        return pages[offset : offset + size]

    def _view(
        self, name: str, file: str, offset: int, size: int, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> torch.Tensor:
        element = DTYPES.get(dtype)
        if element is None or len(shape) != len(stride) or min((*shape, *stride, 0)) < 0:
            raise ArtifactError(f"the manifest describes no tensor under the name {name}", hint="compile again")
        last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else -1
        if (last + 1) * element.itemsize > size:
            raise ArtifactError(f"the manifest gives the weight {name} too few bytes", hint="compile again")
        if not all(shape):
            return torch.empty_strided(shape, stride, dtype=element)
        raw = self._slice(name, file, offset, size // element.itemsize * element.itemsize)
        if raw.data_ptr() % element.itemsize:
            raw = raw.clone()  # a file that others wrote may lie at any byte
        return raw.view(element).as_strided(shape, stride, raw.storage_offset() // element.itemsize)

    def _address(self, name: str, text: str, size: int) -> int:
        file, _, offset = text.rpartition("@")
        if not offset.isdecimal():
            raise ArtifactError(f"the manifest has no address in {name}: {text!r}", hint="compile again")
        return self._slice(name, file, int(offset), size).data_ptr()


def _pages(archive: Archive, file: File) -> torch.Tensor:
    """The bytes of a file, mapped privately."""
    if not file.member:
        path = locate(archive.path, file)
        return torch.from_file(str(path), shared=False, size=file.size, dtype=torch.uint8)
    outer, _, inner = file.member.partition("!")
    start = archive.offset(outer)
    size = archive.manifest.members[outer].size
    if inner:
        start, size = _nested(archive, outer, inner, start)
    whole = torch.from_file(str(archive.path), shared=False, size=archive.path.stat().st_size, dtype=torch.uint8)
    return whole[start : start + size]


def _nested(archive: Archive, outer: str, inner: str, base: int) -> tuple[int, int]:
    try:
        with archive.open_member(outer) as member, zipfile.ZipFile(member) as package:
            info = package.getinfo(inner)
            if info.compress_type != zipfile.ZIP_STORED:
                raise ArtifactError(f"{archive.path}: {inner} in {outer} is compressed", hint="compile again")
            with archive.path.open("rb") as f:
                return data_offset(f, info, base), info.file_size
    except (KeyError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{archive.path}: {outer} is damaged: {error}", hint="compile again") from error


def locate(artifact: Path, file: File) -> Path:
    """Where a file beside the artifact is: it is there and has its size.

    Raises:
        ArtifactError: It is missing, or has another size.
    """
    path = artifact.parent / file.path
    if not path.is_file():
        raise ArtifactError(
            f"{artifact} needs the weights in {path}, which is not there",
            hint="bring the file back, or compile again with --weights inside",
        )
    if path.stat().st_size != file.size:
        raise ArtifactError(f"the weights in {path} were changed since {artifact} was compiled", hint="compile again")
    return path


def check_all(archive: Archive, *, again: bool = False) -> None:
    """Compare the hash of every member and of every file beside. What was compared once and is unchanged is not read.

    Args:
        archive: The artifact.
        again: Read everything all the same.

    Raises:
        ArtifactError: A file or member has another content; it is named.
    """
    members = archive.manifest.members
    whole = members_hash(archive.manifest)
    if again or known_hash(archive.path) != whole:
        for name in members:
            archive.check(name)
        remember(archive.path, whole)
    for file in archive.manifest.weights.files.values():
        if file.member:
            continue
        path = locate(archive.path, file)
        if not again and known_hash(path) == file.sha256:
            continue
        if file_hash(path) != file.sha256:
            raise ArtifactError(
                f"the weights in {path} were changed since {archive.path} was compiled", hint="compile again"
            )
        remember(path, file.sha256)


def members_hash(manifest: Manifest) -> str:
    """One hash for all members."""
    text = "\0".join(f"{name}\0{m.size}\0{m.sha256}" for name, m in sorted(manifest.members.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _note(path: Path) -> tuple[str, list[int]]:
    """The name of the note about a file's hash, and what must be equal for it to hold: identity, size, change."""
    real = path.resolve()
    info = real.stat()
    name = hashlib.sha256(str(real).encode()).hexdigest()[:40]
    return f"checked/{name}.json", [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns]


def remember(path: Path, digest: str) -> None:
    """Note that the file has this hash now."""
    name, state = _note(path)
    store(name, json.dumps([state, digest]))


def known_hash(path: Path) -> str | None:
    """The hash that the file had, if it has not been written to since."""
    name, state = _note(path)
    try:
        then, digest = json.loads((cache_dir() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(digest) if then == state else None
