"""What this machine can do at most: arithmetic and reading, with the cpu backend's compiler and instructions."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from moec.backends.cpu.build import build
from moec.backends.cpu.isa import isa_of
from moec.backends.cpu.load import openmp_library
from moec.ir.errors import MoecError

READ_BYTES = 1 << 30
REPEATS = 5
SOURCE = """
#include <omp.h>
#include <stdlib.h>
#include "dot.h"
using namespace moec;
#define EXPORT extern "C" __attribute__((visibility("default")))

// Multiply-adds on independent accumulators in registers; operations per second of all threads.
template <class T> static double peak(int threads) {
    constexpr int N = 20, TURNS = 2000000;
    static char numbers[64 * 2] = {};
    double start = 0, stop = 0;
    volatile float sink = 0;
#pragma omp parallel num_threads(threads)
    {
        V acc[N];
#pragma GCC unroll 20
        for (int i = 0; i < N; i++) acc[i] = set1((float)(i + 1));  // all different: equal ones would be merged
        Chunk<T> a = Chunk<T>::get((const T*)numbers), b = Chunk<T>::get((const T*)(numbers + 64));
#pragma omp barrier
#pragma omp master
        start = omp_get_wtime();
        for (int turn = 0; turn < TURNS; turn++) {
#pragma GCC unroll 20
            for (int i = 0; i < N; i++) Chunk<T>::add(acc[i], a, b);
            asm volatile("" ::: "memory");
        }
        V sum = zero();
#pragma GCC unroll 20
        for (int i = 0; i < N; i++) sum = sum + acc[i];
        float out[W];
        store_n(out, sum, W);
        if (out[0] != 0) sink = out[0];
#pragma omp barrier
#pragma omp master
        stop = omp_get_wtime();
    }
    return 2.0 * Chunk<T>::STEP * N * TURNS * threads / (stop - start);
}
EXPORT double peak_f32(int threads) { return peak<float>(threads); }
EXPORT double peak_bf16(int threads) { return peak<bf16>(threads); }
EXPORT double peak_f16(int threads) { return peak<f16>(threads); }

// Reads `bytes` once, every thread its part, in blocks taken in turn as the kernels take weights.
EXPORT double bandwidth(const char* data, int64_t bytes, int threads) {
    constexpr int64_t BLOCK = 1 << 18;
    volatile float sink = 0;
    double start = omp_get_wtime();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t block = 0; block < bytes / BLOCK; block++) {
        const float* p = (const float*)(data + block * BLOCK);
        V a = zero(), b = zero(), c = zero(), d = zero();
        for (int64_t i = 0; i < BLOCK / 4; i += 4 * W) {
            _mm_prefetch((const char*)(p + i) + 16384, _MM_HINT_T1);
            a = max(a, load(p + i));
            b = max(b, load(p + i + W));
            c = max(c, load(p + i + 2 * W));
            d = max(d, load(p + i + 3 * W));
        }
        float out[W];
        store_n(out, max(max(a, b), max(c, d)), W);
        if (out[0] > 1) sink = out[0];
    }
    return bytes / (omp_get_wtime() - start);
}
"""


@dataclass(frozen=True)
class Machine:
    """Best of several: multiply-add operations a second (two each), and bytes read a second."""

    flops: float
    bandwidth: float


def measure(dtype: str, threads: int) -> Machine:
    """Measure for element type ``dtype`` with ``threads`` threads; about two seconds.

    Raises:
        MoecError: This processor has none of the cpu backend's instruction sets.
    """
    import torch

    isa = isa_of("cpu")
    if isinstance(isa, str):
        raise MoecError(f"nothing to measure: {isa}")
    openmp_library()
    library = ctypes.CDLL(str(build(SOURCE, isa)))
    peak, bandwidth = getattr(library, f"peak_{dtype}"), library.bandwidth
    peak.restype = bandwidth.restype = ctypes.c_double
    bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    data = torch.zeros(READ_BYTES, dtype=torch.uint8).fill_(1)
    return Machine(
        max(peak(threads) for _ in range(REPEATS)),
        max(bandwidth(data.data_ptr(), READ_BYTES, threads) for _ in range(REPEATS)),
    )
