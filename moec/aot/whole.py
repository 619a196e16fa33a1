"""Writing a file whole: under another name first, so that nothing half-written is ever found under its own."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from moec.aot.behind import Behind
from moec.aot.errors import AotError
from moec.artifact import manifest as m
from moec.artifact.archive import MANIFEST
from moec.artifact.packing import Pack
from moec.artifact.weights import members_hash, remember


def write_whole(path: Path, write: Callable[[Pack, Behind], m.Manifest]) -> int:
    """Write the artifact ``path``, its manifest last; returns its size in bytes.

    Args:
        path: Of the artifact; what is there is replaced.
        write: Writes all other members into the archive and the file behind it, and says what they are.

    Raises:
        AotError: The disk is full, or the folder cannot be written to. What was written is removed.
    """
    _give_back(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            made = Path(folder) / "artifact"
            with Behind(made) as file:
                pack = Pack(file)
                manifest = write(pack, file)
                pack.add(MANIFEST, manifest.to_json().encode())
                pack.finish()
            made.replace(path)
    except OSError as error:
        raise AotError(f"{path} cannot be written: {error.strerror or error}") from error
    remember(path, members_hash(manifest))
    return path.stat().st_size


def _give_back(path: Path) -> None:
    """Take the file that is to be replaced out of the system's cache: the new one goes into its memory.

    Memory that a virtual machine has not touched yet comes from its host page by page, at a third of the speed.
    """
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
