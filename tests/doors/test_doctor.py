"""The doctor: what is missing is said with what to do about it, and nothing makes the doctor itself fail."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from moec import doctor
from moec.backends.registry import BackendError
from moec.doctor import Check


def only(checks: list[Check], name: str) -> Check:
    (found,) = (c for c in checks if c.name == name)
    return found


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    found = only(list(doctor._compiler()), "C++ compiler")
    assert found.state == "warn"
    assert "g++" in found.hint


def test_a_broken_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\necho 'cannot find ld' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert "cannot find ld" in only(list(doctor._compiler()), "C++ compiler").detail


def test_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.99.0")
    found = only(list(doctor._torch()), "torch")
    assert (found.state, found.hint) == ("warn", "untested version; pip install 'torch>=2.11,<2.14'")


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    (found,) = doctor._entry_point()
    assert (found.state, "pip install" in found.hint) == ("warn", True)


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path / "new"))
    assert only(list(doctor._cache()), "cache directory").state == "ok"
    assert not (tmp_path / "new").exists()  # looking makes nothing
    (tmp_path / "new").mkdir()
    (tmp_path / "new").chmod(0o777)
    found = only(list(doctor._cache()), "cache directory")
    assert found.detail.startswith("refused")
    assert "MOEC_CACHE_DIR" in found.hint


def test_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    checks = list(doctor._extras())
    assert {c.state for c in checks} == {"missing"}
    assert [c.hint for c in checks] == [f"pip install 'moec[{extra}]'" for extra in doctor.EXTRAS]


def test_a_broken_plugin_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise BackendError("the backend package 'x' does not import", hint="mend it")

    monkeypatch.setattr("moec.backends.registry.all_backends", broken)
    (found,) = doctor._backends()
    assert (found.state, found.hint) == ("warn", "mend it")
