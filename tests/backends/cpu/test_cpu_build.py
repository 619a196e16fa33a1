"""Building kernels: cached by content, whole or not there, and errors that say what to do."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from moec.backends.cpu import CpuBackend, build
from moec.backends.cpu.isa import LEVELS, isa_of, missing
from tests.backends.cases import ExpertsCase

BACKEND = CpuBackend()
pytestmark = pytest.mark.skipif(
    build.compiler() is None or bool(missing(LEVELS["avx2"])), reason="no C++ compiler, or no AVX2 in this processor"
)
SOURCE = 'extern "C" __attribute__((visibility("default"))) void moec_experts(const void*) {}\n'
ISA = LEVELS["avx2"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path / "cache"))


def files(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache" / "cpu").iterdir())


def test_a_kernel_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.build(SOURCE, ISA)
    assert files(tmp_path) == [path.name]
    monkeypatch.setattr(build, "_compile", lambda *a: pytest.fail("it was built again"))
    assert build.build(SOURCE, ISA) == path


def test_source_compiler_and_instructions_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {build.library_path(SOURCE, ISA), build.library_path(SOURCE + " ", ISA)}
    names |= {build.library_path(SOURCE, LEVELS["avx512"]), build.library_path(SOURCE, ISA, ("-g",))}
    monkeypatch.setattr(build, "compiler_text", lambda: "another compiler 1.0")
    names.add(build.library_path(SOURCE, ISA))
    assert len(names) == 5


def test_more_flags_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build.library_path(SOURCE, ISA)
    monkeypatch.setenv(build.EXTRA_FLAGS, "-g -DONE=1")
    assert build.library_path(SOURCE, ISA) != plain
    text = "#if ONE != 1\n#error no\n#endif\n" + SOURCE
    assert build.build(text, ISA).exists()
    monkeypatch.delenv(build.EXTRA_FLAGS)
    with pytest.raises(build.BuildError):
        build.build(text, ISA)


def test_a_refused_source_is_told_and_leaves_no_library(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="refused") as caught:
        build.build("int broken(", ISA)
    assert "failed.cpp" in str(caught.value.hint)
    assert not [f for f in files(tmp_path) if not f.endswith(".failed.cpp")]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    op = ExpertsCase().graph().ops[0]
    build.warn_of_no_compiler.cache_clear()
    with caplog.at_level("WARNING", logger="moec.cpu"):
        for _ in range(2):
            assert "no C++ compiler" in BACKEND.supports(op, "cpu").reason
    (told,) = caplog.messages  # once
    assert "install g++" in told
    assert [line.works for line in BACKEND.status()][:2] == [True, False]
    with pytest.raises(build.BuildError, match=r"g\+\+"):
        build.build(SOURCE, ISA)


PROGRAM = """
import sys
from moec.backends.cpu import build
from moec.backends.cpu.isa import LEVELS
print(build.build(sys.argv[1], LEVELS["avx2"]), flush=True)
"""


def test_of_two_processes_one_builds_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler notes what it is asked, and is slow enough for the other process to come while it works.
    counting = tmp_path / "counting-g++"
    counting.write_text('#!/bin/sh\necho "$*" >> "$SEEN"\ncase "$*" in *" -c "*) sleep 1;; esac\nexec g++ "$@"\n')
    counting.chmod(0o700)
    monkeypatch.setenv("CXX", str(counting))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    command = [sys.executable, "-c", PROGRAM, SOURCE]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [p.communicate(timeout=120)[0].strip() for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert told[0] == told[1]
    assert sum(" -c " in line for line in (tmp_path / "seen").read_text().splitlines()) == 1
    assert files(tmp_path) == [Path(told[0]).name]


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow-g++"
    slow.write_text('#!/bin/sh\ncase "$*" in *--version*) exec g++ "$@";; esac\ntouch "$SEEN"\nexec sleep 60\n')
    slow.chmod(0o700)
    seen = tmp_path / "seen"
    monkeypatch.setenv("SEEN", str(seen))
    with monkeypatch.context() as m:
        m.setenv("CXX", str(slow))
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, SOURCE])
        deadline = time.monotonic() + 60
        while not seen.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()
    assert seen.exists()
    assert not [f for f in files(tmp_path) if f.endswith(".so")]
    assert build.build(SOURCE, ISA).exists()


def test_targets_name_instruction_sets() -> None:
    assert isa_of("cpu:avx2") is LEVELS["avx2"]
    assert isa_of("cpu:amx,cores=4") is LEVELS["amx"]
    assert isa_of("cpu") in LEVELS.values()
    assert "no CPU" in str(isa_of("cuda:sm90"))
    assert "avx2" in str(isa_of("cpu:scalar"))
