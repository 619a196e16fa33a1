"""The cache directory: used only where it is safe, refused with one warning, never in the way of a compile."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

import pytest

from moec import cache


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No memory of other directories, and temporary ones below this test's folder."""
    monkeypatch.setattr(cache, "_resolved", {})
    monkeypatch.setattr(cache, "_told", set())
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))


def use(monkeypatch: pytest.MonkeyPatch, path: Path) -> Path:
    monkeypatch.setenv("MOEC_CACHE_DIR", str(path))
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refused(match: str) -> Path:
    """The private directory used instead, after exactly one warning that says why."""
    with pytest.warns(cache.CacheWarning, match=match) as caught:
        private = cache.cache_dir()
    assert len(caught) == 1
    assert mode(private) == 0o700
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.cache_dir() == private  # told once
    return private


def test_created_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = use(monkeypatch, tmp_path / "a" / "b")
    old = os.umask(0)
    try:
        assert cache.cache_dir() == wanted
    finally:
        os.umask(old)
    assert mode(wanted) == 0o700
    assert list(wanted.iterdir()) == []  # the probe is gone


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"MOEC_CACHE_DIR": "/m", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/m"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/moec"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/moec"),
        ({"HOME": "/h"}, "/h/.cache/moec"),
    ],
)
def test_where(environ: dict[str, str], expected: str) -> None:
    assert cache.wanted_dir(environ) == Path(expected)


@pytest.mark.parametrize("bits", [0o770, 0o702, 0o777])
def test_writable_by_others_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bits: int) -> None:
    wanted = use(monkeypatch, tmp_path / "open")
    wanted.mkdir()
    wanted.chmod(bits)
    assert refused(f"refused.*other users.*{bits:04o}") != wanted
    assert list(wanted.iterdir()) == []


@pytest.mark.parametrize("bits", [0o700, 0o755])
def test_readable_by_others_is_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bits: int) -> None:
    wanted = use(monkeypatch, tmp_path / "mine")
    wanted.mkdir()
    wanted.chmod(bits)
    assert cache.cache_dir() == wanted


def test_owned_by_another_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = use(monkeypatch, tmp_path / "theirs")
    wanted.mkdir(mode=0o700)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert refused(f"refused.*belongs to user {other - 1}, not to user {other}") != wanted


def test_a_link_is_judged_by_what_it_points_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    link = use(monkeypatch, tmp_path / "link")
    link.symlink_to(tmp_path / "open")
    refused("refused.*other users")


@pytest.mark.parametrize(("bits", "safe"), [(0o777, False), (0o1777, True)])
def test_a_parent_open_to_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bits: int, safe: bool) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(bits)
    wanted = use(monkeypatch, tmp_path / "shared" / "moec")
    if safe:
        assert cache.cache_dir() == wanted
    else:
        refused("could replace .*moec")
        assert not wanted.exists()


def test_a_file_in_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = use(monkeypatch, tmp_path / "file")
    wanted.write_text("x")
    refused("cannot be used.*not a directory")
    assert wanted.read_text() == "x"


def test_a_file_above_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    use(monkeypatch, tmp_path / "file" / "moec")
    refused("cannot be used")


def test_unreadable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = use(monkeypatch, tmp_path / "dark")
    wanted.mkdir(mode=0o700)
    # The superuser reads everything, so the kernel's answer is played.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != wanted)
    refused("cannot be read and written")


def test_read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = use(monkeypatch, tmp_path / "frozen")
    wanted.mkdir(mode=0o700)
    real = cache.tempfile.NamedTemporaryFile

    def frozen(*args: object, dir: Path, **kwargs: object) -> object:
        if Path(dir) == wanted:
            raise OSError(30, "Read-only file system")
        return real(*args, dir=dir, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(cache.tempfile, "NamedTemporaryFile", frozen)
    refused("cannot be used: Read-only file system")


def test_removed_while_running(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = use(monkeypatch, tmp_path / "gone")
    cache.cache_dir()
    wanted.rmdir()
    assert cache.cache_dir() == wanted
    assert wanted.is_dir()


def test_write_atomic_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "program.moe"
    cache.write_atomic(path, "old")
    cache.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["program.moe"]


def test_write_atomic_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "program.moe"
    path.write_text("old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        cache.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["program.moe"]


def test_store_warns_once_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, tmp_path / "cache")
    assert cache.store("a/b.moe", "text") == tmp_path / "cache" / "a" / "b.moe"

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.warns(cache.CacheWarning, match=r"nothing can be stored.*No space"):
        assert cache.store("c.moe", "text") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.store("d.moe", "text") is None
