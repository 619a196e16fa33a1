"""What is built is what is in the tree: every module and data file once, under its import path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"moec": "moec", "ir": "moec/ir", "passes": "moec/passes", "backends": "moec/backends"}
DATA = {".typed", ".moe", ".json", ".h", ".cpp"}
BUILT_FROM = [*ROOMS, "pyproject.toml", "README.md", "LICENSE"]


def expected_files() -> list[str]:
    """Wheel paths of all source files; the links in moec/ are not followed."""
    found = []
    for room, target in ROOMS.items():
        for folder, folders, files in os.walk(ROOT / room):
            folders[:] = [f for f in folders if f != "__pycache__" and not Path(folder, f).is_symlink()]
            place = Path(target) / Path(folder).relative_to(ROOT / room)
            found += [(place / f).as_posix() for f in files if Path(f).suffix in {".py", *DATA}]
    return sorted(found)


def copy_tree(to: Path) -> Path:
    """The files that are built from, so that no build output lands in the checkout or is taken from it."""
    to.mkdir()
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)
    return to


def build_wheel(source: Path, to: Path) -> list[str]:
    """Builds a wheel of ``source``; the paths inside, without the metadata."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    made = subprocess.run([*pip, "--wheel-dir", str(to), str(source)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (wheel,) = to.glob("moec-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return [n for n in archive.namelist() if ".dist-info/" not in n]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("build") / "tree")


def check(names: list[str]) -> None:
    twice = [n for n, count in Counter(names).items() if count > 1]
    assert not twice
    expected = set(expected_files())
    assert sorted(expected - set(names)) == [], "missing: list its package under [tool.setuptools] packages"
    assert sorted(set(names) - expected) == []


def test_the_wheel_holds_the_tree(tree: Path, tmp_path: Path) -> None:
    check(build_wheel(tree, tmp_path))


def test_the_sdist_builds_the_same_wheel(tree: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    made = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        if hasattr(tarfile, "data_filter"):  # from 3.11.4 on
            packed.extraction_filter = tarfile.data_filter
        packed.extractall(tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    check(build_wheel(source, tmp_path / "wheel"))


def test_a_checkout_works_uninstalled(tree: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(tree)!r})\n"
        "import moec.ir.types, moec.passes.base, moec.backends.base, moec.cli\n"
        f"assert moec.__file__.startswith({str(tree)!r})\n"
        f"assert moec.ir.types.__file__ == {str(tree / 'moec' / 'ir' / 'types.py')!r}"
    )
    made = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_the_links_are_relative() -> None:
    for room in ("ir", "passes", "backends"):
        link = ROOT / "moec" / room
        assert link.is_symlink()
        assert link.readlink() == Path("..") / room
