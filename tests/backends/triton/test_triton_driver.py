"""The driver's calls, against a library that writes down what it is asked for."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from moec.backends.cpu.build import compiler
from moec.backends.triton.compiled import driver as driver_module
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
int retained = -1, current = 0, bound = 0;
int cuCtxGetCurrent(void** context) { *context = current ? (void*)0x300 : nullptr; return 0; }
int cuDeviceGet(int* device, int number) { *device = 10 + number; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { retained = device; *context = (void*)0x400; return 0; }
int cuCtxSetCurrent(void* context) { bound = context == (void*)0x400; current = 1; return 0; }
int cuGetErrorName(int code, const char** text) { *text = code == 200 ? "CUDA_ERROR_INVALID_IMAGE" : 0; return 0; }
int preferred = 0;
int cuFuncSetCacheConfig(void* f, int what) { preferred = what; return 0; }
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
    driver = Driver(str(library), "cu", lambda: 0)
    function = driver.load(b"cubin...", "up", threads=256, shared=100_000)
    assert ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "asked").value == 100_000
    assert ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "preferred").value == 1
    assert (ctypes.c_char * 64).in_dll(ctypes.CDLL(str(library)), "name").value == b"up"
    driver.launch(function, (5, 7), ["*bf16", "i32", "fp32"], [1 << 40, -3, 0.25], stream=9, scratch=77)
    assert seen(library)[:13] == [0x200, 5, 7, 1, 256, 1, 100_000, 9, 1 << 40, -3, 250, 77, 0]


def test_a_thread_without_a_context_takes_the_devices(library: Path) -> None:
    """CUDA's contexts are a thread's own; PyTorch may not have made one current in this one."""

    def number(name: str) -> ctypes.c_int:
        return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), name)

    number("current").value, number("retained").value = 0, -1
    driver = Driver(str(library), "cu", lambda: 3)
    function = driver.load(b"cubin", "up", threads=128, shared=0)
    assert (number("retained").value, number("bound").value) == (13, 1)
    number("retained").value = -1
    driver.launch(function, (1,), ["*bf16", "i32", "fp32"], [0, 0, 0.0])
    assert number("retained").value == -1  # there is one now
    number("current").value = 0
    driver.launch(function, (1,), ["*bf16", "i32", "fp32"], [0, 0, 0.0])
    assert number("retained").value == 13


def test_an_empty_grid_launches_nothing(library: Path) -> None:
    driver = Driver(str(library), "cu", lambda: 0)
    function = driver.load(b"cubin", "up", threads=128, shared=0)
    before = seen(library)[13]
    driver.launch(function, (0,), ["*bf16", "i32", "fp32"], [0, 0, 0.0])
    assert seen(library)[13] == before


def test_what_the_driver_refuses_is_an_error(library: Path) -> None:
    driver = Driver(str(library), "cu", lambda: 0)
    with pytest.raises(DriverError, match=r"cannot load up: its error 200 \(CUDA_ERROR_INVALID_IMAGE\)"):
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


def test_hips_library_is_the_one_that_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "Path", lambda _: tmp_path / "maps")
    assert driver_module._hip_library() == "libamdhip64.so"
    mine = "/venv/lib/torch/lib/libamdhip64.so.7"
    (tmp_path / "maps").write_text(f"7f00-7f10 r-xp 00000000 fe:01 1 /lib/libc.so.6\n7f10-7f20 r-xp 0 fe:01 2 {mine}\n")
    assert driver_module._hip_library() == mine


def test_an_unknown_type() -> None:
    with pytest.raises(DriverError, match="'fp8'"):
        pack("fp8", 1)
