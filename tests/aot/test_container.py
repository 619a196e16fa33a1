"""Looking into an artifact runs nothing of it, and whatever is wrong with one is a clear message."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moec
from moec.artifact.archive import ALIGN, MANIFEST, Archive, aligned_member
from moec.artifact.errors import ArtifactError
from moec.artifact.manifest import TensorSpec
from moec.artifact.weights import Mapped, check_all
from moec.cli.app import main
from moec.cli.run import RunError, _arrays
from tests.aot.artifacts import PACKAGE, forged

Change = Callable[[dict[str, Any]], object]


def opened(path: Path) -> None:
    with Archive(path):
        pass


def test_members_begin_at_pages_and_hashes_hold(tmp_path: Path) -> None:
    path = forged(tmp_path / "a.moec")
    with Archive(path) as archive:
        assert archive.offset(PACKAGE) % ALIGN == 0
        assert archive.read(PACKAGE) == b"no code"
        check_all(archive)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no file"),
        (lambda p: p.write_bytes(b"MOEC" * 100), "is no moec artifact"),
        (lambda p: p.write_bytes(b""), "is no moec artifact"),
        (lambda p: p.write_bytes(forged(p).read_bytes()[:-30]), "is cut off"),
        (lambda p: p.write_bytes(forged(p).read_bytes()[: ALIGN + 3]), "is cut off"),
        (lambda p: zipfile.ZipFile(p, "w").close(), f"it has no {MANIFEST}"),
        (lambda p: p.mkdir(), "cannot be read"),
    ],
    ids=["none", "magic", "empty", "cut", "cut-early", "other-zip", "folder"],
)
def test_what_is_no_artifact(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / "a.moec")
    with pytest.raises(ArtifactError, match=message):
        opened(tmp_path / "a.moec")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(format_version=2), "format version 2; this moec reads versions up to 1"),
        (lambda t: t.update(format="zip"), "does not say 'moec-artifact'"),
        (lambda t: t.update(format_version="1"), "has no format version"),
        (lambda t: t.pop("blobs"), "lacks 'blobs'"),
        (lambda t: t.update(more=1), "unknown field 'more'"),
        (lambda t: t["members"][PACKAGE].update(size="7"), "not a int"),
        (lambda t: t["members"][PACKAGE].update(size=8), "it has another size"),
        (lambda t: t["members"].update(other={"size": 1, "sha256": ""}), "lacks other, which its manifest lists"),
        (lambda t: t["members"].clear(), f"holds {PACKAGE}, which its manifest does not list"),
        (lambda t: t["entries"]["model"].update(dims={"batch": [1]}), "dims"),
        (lambda t: t["blobs"][0].update(member="gone"), "is no member: gone"),
    ],
)
def test_a_manifest_that_is_wrong(change: Change, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        opened(forged(tmp_path / "a.moec", change))


@pytest.mark.parametrize("text", ["{", "[]", '{"format": ' + "[" * 10_000, "\xff"])
def test_a_manifest_that_is_no_json(text: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.moec", "w") as archive:
        archive.writestr(MANIFEST, text.encode("latin-1"))
    with pytest.raises(ArtifactError, match="manifest"):
        opened(tmp_path / "a.moec")


@pytest.mark.parametrize("name", ["../out", "/abs", "a/../../b", "a\\..\\b", "C:evil", "a//b", "./a", "folder/"])
def test_names_that_lead_elsewhere(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.moec"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MANIFEST, "{}")
        archive.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(ArtifactError, match="a name that could lead elsewhere"):
        opened(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.moec"]


def test_a_member_twice(tmp_path: Path) -> None:
    path = forged(tmp_path / "a.moec")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(PACKAGE, b"other")
    with pytest.raises(ArtifactError, match="holds a member twice"):
        opened(path)


def test_an_edited_member_is_noticed(tmp_path: Path) -> None:
    path = forged(tmp_path / "a.moec", lambda t: t["members"][PACKAGE].update(sha256="0" * 64))
    with Archive(path) as archive, pytest.raises(ArtifactError, match=f"{PACKAGE} was changed"):
        archive.read(PACKAGE)
    with pytest.raises(ArtifactError, match=f"{PACKAGE} was changed"):
        moec.load(path)


class Bomb:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_inspecting_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a pickle nor a library in the artifact is touched by inspect, whatever it is asked for."""
    import hashlib

    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Bomb())
    member = {"size": len(evil), "sha256": hashlib.sha256(evil).hexdigest()}
    path = forged(tmp_path / "a.moec", lambda t: t["members"].update({"x.pkl": member}), {"x.pkl": evil})
    for more in ([], ["--json"], ["--verify"], ["--extract", "out"]):
        with pytest.raises(SystemExit) as stop:
            main(["inspect", str(path), *more])
        assert not stop.value.code, capsys.readouterr().err
    assert (tmp_path / "out" / "x.pkl").read_bytes() == evil
    assert not (tmp_path / "exploded").exists()
    pickle.loads(evil)
    assert (tmp_path / "exploded").exists()


def test_extract_only_into_a_new_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = forged(tmp_path / "a.moec")
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path), "--extract", str(tmp_path)])
    assert stop.value.code == 2 and "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"offset": 1 << 40}, "outside of its file"),
        ({"size": -4}, "too few bytes"),
        ({"file": "other"}, "outside of its file"),
        ({"shape": [100]}, "too few bytes"),
        ({"stride": [-1]}, "describes no tensor"),
        ({"dtype": "pickle"}, "describes no tensor"),
    ],
)
def test_weights_that_lie_elsewhere(tensor: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Offsets and shapes of a manifest cannot make a tensor reach beyond its file."""
    file = {"member": PACKAGE, "path": "", "size": 7, "sha256": ""}
    entry = {"dtype": "u8", "shape": [4], "stride": [1], "file": "f", "offset": 0, "size": 4}

    def change(tree: dict[str, Any]) -> None:
        tree["weights"] = {"where": "inside", "files": {"f": file}, "tensors": {"w": entry | tensor}, "tables": {}}

    with Archive(forged(tmp_path / "a.moec", change)) as archive, pytest.raises(ArtifactError, match=message):
        Mapped(archive)


def test_weights_are_the_files_pages(tmp_path: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        file = {"member": PACKAGE, "path": "", "size": 7, "sha256": ""}
        entry = {"dtype": "u8", "shape": [2, 2], "stride": [1, 2], "file": "f", "offset": 3, "size": 4}
        tree["weights"] = {"where": "inside", "files": {"f": file}, "tensors": {"w": entry}, "tables": {}}

    with Archive(forged(tmp_path / "a.moec", change)) as archive:
        assert Mapped(archive).tensors["w"].tolist() == torch.tensor(list(b"code")).view(2, 2).t().tolist()


def test_code_for_nobody_here(tmp_path: Path) -> None:
    path = forged(tmp_path / "a.moec", lambda t: t["blobs"][0].update(target="cuda:sm90", kind="cubin"))
    with pytest.raises(ArtifactError, match=r"holds code for cuda:sm90 \(cubin\): none of it runs here"):
        moec.load(path)


def test_code_that_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"{PACKAGE} is damaged"):
        moec.load(forged(tmp_path / "a.moec"))


def test_aligned_members_are_readable_by_any_zip_tool(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in (("a", b"1"), ("b/c", b"22"), ("empty", b"")):
            with aligned_member(archive, name) as member:
                member.write(data)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None
        assert {n: archive.read(n) for n in archive.namelist()} == {"a": b"1", "b/c": b"22", "empty": b""}


def test_npz_with_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.array([{}], dtype=object))
    with pytest.raises(RunError, match=r"cannot be read as \.npz"):
        _arrays(tmp_path / "in.npz", (TensorSpec("x", "f32", (1,)),))
