// What a processor allows at best. Compiled for the instruction set that the cpu backend's kernels use.
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
#if defined(__AVX512F__)
typedef __m512 V;
constexpr int ACCUMULATORS = 24;  // more than latency x pipes, fewer than registers
static inline V madd(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V fill(float x) { return _mm512_set1_ps(x); }
static inline V larger(V a, V b) { return _mm512_max_ps(a, b); }
static inline V read(const char* p) { return _mm512_loadu_ps((const float*)p); }
#else
typedef __m256 V;
constexpr int ACCUMULATORS = 12;
static inline V madd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V fill(float x) { return _mm256_set1_ps(x); }
static inline V larger(V a, V b) { return _mm256_max_ps(a, b); }
static inline V read(const char* p) { return _mm256_loadu_ps((const float*)p); }
#endif
constexpr int TURNS = 2000000;
static volatile float sink;

// Operations per second of one thread: multiply-adds on independent accumulators. They differ, so none can be merged.
template <class Step> static double peak(int operations, Step step) {
    V acc[ACCUMULATORS];
#pragma GCC unroll 24
    for (int i = 0; i < ACCUMULATORS; i++) acc[i] = fill(i + 1);
    double start = omp_get_wtime();
    for (int turn = 0; turn < TURNS; turn++) {
#pragma GCC unroll 24
        for (int i = 0; i < ACCUMULATORS; i++) acc[i] = step(acc[i]);
        asm volatile("" ::: "memory");
    }
    double seconds = omp_get_wtime() - start;
    V sum = fill(0);
#pragma GCC unroll 24
    for (int i = 0; i < ACCUMULATORS; i++) sum = larger(sum, acc[i]);
    sink = ((float*)&sum)[0];
    return 2.0 * operations * ACCUMULATORS * TURNS / seconds;
}
EXPORT double peak_f32() {
    V a = fill(1e-3f), b = fill(1e-3f);
    asm volatile("" : "+v"(a), "+v"(b));  // not known when compiling
    return peak(sizeof(V) / 4, [&](V c) { return madd(a, b, c); });
}
EXPORT double peak_bf16() {
#if defined(__AMX_BF16__)
    // Four independent products of 16 x 32 and 32 x 16. That the process may use tiles was asked with the choice of AMX.
    struct __attribute__((packed)) {
        uint8_t palette = 1, rest[15] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    double start = omp_get_wtime();
    for (int turn = 0; turn < TURNS; turn++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    double seconds = omp_get_wtime() - start;
    _tile_release();
    return 4 * 2.0 * 16 * 16 * 32 * TURNS / seconds;
#elif defined(__AVX512BF16__)
    __m512i a = _mm512_set1_epi16(0x3a83), b = a;
    asm volatile("" : "+v"(a), "+v"(b));
    return peak(sizeof(V) / 2, [&](V c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); });
#else
    return peak_f32();
#endif
}

// Seconds to read `bytes` once, in blocks that free threads take in turn, as the kernels take weights.
EXPORT double read_seconds(const char* data, int64_t bytes, int threads) {
    constexpr int64_t BLOCK = 1 << 18, AHEAD = 16384;
    double start = omp_get_wtime();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t block = 0; block < bytes / BLOCK; block++) {
        const char* p = data + block * BLOCK;
        V a = fill(0), b = a, c = a, d = a;
        for (int64_t i = 0; i < BLOCK; i += 4 * sizeof(V)) {
            for (int line = 0; line < (int)(4 * sizeof(V)); line += 64) _mm_prefetch(p + i + line + AHEAD, _MM_HINT_T0);
            a = larger(a, read(p + i));
            b = larger(b, read(p + i + sizeof(V)));
            c = larger(c, read(p + i + 2 * sizeof(V)));
            d = larger(d, read(p + i + 3 * sizeof(V)));
        }
        V all = larger(larger(a, b), larger(c, d));
        if (((float*)&all)[0] > 1) sink = 1;
    }
    return omp_get_wtime() - start;
}

// Seconds of a team's start and three barriers, once the threads are awake.
EXPORT double region_seconds(int threads, int rounds) {
    double start = omp_get_wtime();
    for (int round = 0; round < rounds; round++) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp barrier
#pragma omp barrier
#pragma omp barrier
        }
    }
    return (omp_get_wtime() - start) / rounds;
}
