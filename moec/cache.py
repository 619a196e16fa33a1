"""The cache directory. Compiled code is loaded from there, so it is used only where nobody else can write to it.

The directory is ``$MOEC_CACHE_DIR``, else ``$XDG_CACHE_HOME/moec``, else ``~/.cache/moec``, created with mode 0700. One
that another user owns or may write to is refused; a broken or read-only one cannot be used. In both cases the reason is
told once, as a ``CacheWarning``, and a private temporary directory takes its place until the process ends.
"""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import stat
import tempfile
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_PRIVATE = 0o700

_lock = threading.Lock()
_resolved: dict[Path, Path] = {}
_told: set[Path] = set()


class CacheWarning(UserWarning):
    """The cache directory cannot be used, or something could not be stored in it."""


@dataclass(frozen=True)
class CacheState:
    """What is the matter with a cache directory. ``reason`` is None where it can be used; ``unsafe`` is a refusal."""

    path: Path
    reason: str | None = None
    unsafe: bool = False


def wanted_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The directory the environment asks for, usable or not."""
    environ = os.environ if environ is None else environ
    if explicit := environ.get("MOEC_CACHE_DIR"):
        return Path(explicit).expanduser().absolute()
    base = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    root = Path(base) if os.path.isabs(base) else Path(environ.get("HOME") or os.path.expanduser("~")) / ".cache"
    return root.absolute() / "moec"


def check_dir(path: Path) -> CacheState:
    """Whether code may be loaded from ``path``. Creates nothing; a missing path is judged by its parents."""
    try:
        real = Path(os.path.realpath(path))
        below = real
        for folder in (real, *real.parents):
            if not folder.exists():
                below = folder
                continue
            info = os.stat(folder)
            if reason := _unsafe(folder, info, below=None if folder == real else below):
                return CacheState(path, reason, unsafe=True)
            if not stat.S_ISDIR(info.st_mode):
                return CacheState(path, f"{folder} is not a directory")
            below = folder
        nearest_folder = next(f for f in (real, *real.parents) if f.exists())
        if not os.access(nearest_folder, os.R_OK | os.W_OK | os.X_OK):
            return CacheState(path, f"{nearest_folder} cannot be read and written by this user")
    except OSError as e:
        return CacheState(path, f"it cannot be examined ({e.strerror or e})")
    return CacheState(path)


def _unsafe(folder: Path, info: os.stat_result, below: Path | None) -> str | None:
    mode = stat.S_IMODE(info.st_mode)
    if below is None:  # the cache directory itself, not a parent of it
        if info.st_uid != os.geteuid():
            return f"{folder} belongs to user {info.st_uid}, not to user {os.geteuid()}"
        if mode & _OTHERS_MAY_WRITE:
            return f"{folder} may be written to by other users (mode {mode:04o})"
    elif mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        # Whoever may write to a parent can put another directory in this one's place; the sticky bit prevents that.
        return f"{folder} may be written to by other users (mode {mode:04o}), who could replace {below}"
    return None


def cache_dir() -> Path:
    """The directory to store to and load from: the wanted one, or a private temporary one after a warning.

    The answer is settled once a process for each wanted directory.
    """
    wanted = wanted_dir()
    with _lock:
        usable = _resolved.get(wanted)
        if usable is None or not usable.is_dir():
            usable = _resolved[wanted] = _prepare(wanted)
    return usable


def _prepare(wanted: Path) -> Path:
    state = check_dir(wanted)
    if state.reason is None:
        try:
            _make_private(wanted)
            state = check_dir(wanted)  # again: somebody may have been quicker
            with tempfile.NamedTemporaryFile(dir=wanted, prefix=".probe-"):
                pass  # the only sure sign that the file system takes writes
        except OSError as e:
            state = CacheState(wanted, e.strerror or str(e))
        if state.reason is None:
            return wanted
    private = Path(tempfile.mkdtemp(prefix="moec-"))
    atexit.register(_remove, private, os.getpid())
    what = "is refused, because code is loaded from it" if state.unsafe else "cannot be used"
    cure = "run `chmod go-w` on it, or set" if state.unsafe else "mend it, or set"
    warnings.warn(
        f"the cache directory {wanted} {what}: {state.reason}. A private temporary one is used until this process "
        f"ends; {cure} MOEC_CACHE_DIR to a directory of your own.",
        CacheWarning,
        stacklevel=3,
    )
    return private


def _make_private(folder: Path) -> None:
    """``mkdir -p`` with mode 0700 for every folder made: ``Path.mkdir`` leaves the parents to the umask."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    for f in reversed(missing):
        f.mkdir(mode=_PRIVATE, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _remove(private: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child must not take the directory from its parent
        shutil.rmtree(private, ignore_errors=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes ``data`` so that any reader sees the whole old file or the whole new one, never a part.

    Missing folders are created with mode 0700.

    Raises:
        OSError: The disk is full, or the directory is gone or read-only. No partial file stays behind.
    """
    _make_private(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def store(name: str, data: bytes | str) -> Path | None:
    """Writes ``data`` to the cache under the relative path ``name``; None, after one warning, where that fails.

    A cache is an aid: a disk that fills up while compiling costs time, never the result.
    """
    folder = cache_dir()
    path = folder / name
    try:
        write_atomic(path, data)
    except OSError as e:
        with _lock:
            first = folder not in _told
            _told.add(folder)
        if first:
            warnings.warn(
                f"nothing can be stored in the cache directory {folder}: {e.strerror or e}. "
                "Compiling goes on without it.",
                CacheWarning,
                stacklevel=2,
            )
        return None
    return path
