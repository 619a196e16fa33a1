"""The driver's calls, against a library that writes down what it is asked for."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from moec.backends.cpu.build import compiler
from moec.backends.triton.compiled.driver import Driver, DriverError, pack

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

FAKE = r"""
#include <cstring>
typedef long long wide;
typedef unsigned u;
extern "C" {
wide seen[16];
char name[64];
int refuse = 0, asked = 0;
int cuModuleLoadData(void** module, const void* code) {
    *module = (void*)0x100;
    return std::memcmp(code, "cubin", 5) ? 200 : 0;
}
int cuModuleGetFunction(void** f, void* module, const char* n) {
    std::strcpy(name, n);
    *f = (void*)0x200;
    return module == (void*)0x100 ? 0 : 1;
}
int cuFuncSetAttribute(void* f, int what, int value) { asked = what == 8 ? value : -1; return value > 232448; }
int cuLaunchKernel(void* f, u x, u y, u z, u bx, u by, u bz, u shared, void* stream, void** p, void** extra) {
    wide told[] = {(wide)f, x, y, z, bx, by * bz, shared, (wide)stream, *(wide*)p[0], *(int*)p[1],
                   (wide)(1000 * *(float*)p[2]), *(wide*)p[3], *(wide*)p[4]};
    std::memcpy(seen, told, sizeof told);
    seen[13]++;
    return refuse;
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "fake.cpp").write_text(FAKE)
    made = folder / "libfake.so"
    subprocess.run([compiler() or "g++", "-shared", "-fPIC", "-o", made, folder / "fake.cpp"], check=True)
    return made


def seen(library: Path) -> list[int]:
    return list((ctypes.c_longlong * 16).in_dll(ctypes.CDLL(str(library)), "seen"))


def test_a_launch_hands_on_every_argument(library: Path) -> None:
    driver = Driver(str(library), "cu")
    function = driver.load(b"cubin...", "up", threads=256, shared=100_000)
    assert ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "asked").value == 100_000
    assert (ctypes.c_char * 64).in_dll(ctypes.CDLL(str(library)), "name").value == b"up"
    driver.launch(function, (5, 7), ["*bf16", "i32", "fp32"], [1 << 40, -3, 0.25], stream=9, scratch=77)
    assert seen(library)[:13] == [0x200, 5, 7, 1, 256, 1, 100_000, 9, 1 << 40, -3, 250, 77, 0]


def test_an_empty_grid_launches_nothing(library: Path) -> None:
    driver = Driver(str(library), "cu")
    function = driver.load(b"cubin", "up", threads=128, shared=0)
    before = seen(library)[13]
    driver.launch(function, (0,), ["*bf16", "i32", "fp32"], [0, 0, 0.0])
    assert seen(library)[13] == before


def test_what_the_driver_refuses_is_an_error(library: Path) -> None:
    driver = Driver(str(library), "cu")
    with pytest.raises(DriverError, match="cannot load up: its error 200"):
        driver.load(b"another", "up", threads=128, shared=0)
    with pytest.raises(DriverError, match="give up 300000 bytes of shared memory"):
        driver.load(b"cubin", "up", threads=128, shared=300_000)
    ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "refuse").value = 701
    function = driver.load(b"cubin", "up", threads=128, shared=0)
    with pytest.raises(DriverError, match="701"):
        driver.launch(function, (1,), ["*bf16", "i32", "fp32"], [0, 0, 0.0])
    ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "refuse").value = 0


def test_a_library_that_is_no_driver() -> None:
    with pytest.raises(DriverError, match="cannot be used"):
        Driver("libnowhere.so.1", "cu")
    with pytest.raises(DriverError, match="cannot be used"):
        Driver("libm.so.6", "hip")


def test_an_unknown_type() -> None:
    with pytest.raises(DriverError, match="'fp8'"):
        pack("fp8", 1)
