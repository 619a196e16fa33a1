// What a processor can do at most: multiply-adds with operands in registers, and reading memory.
// Compiled with the flags of the cpu backend's instruction set; probes.py loads it.
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__AVX512F__)
typedef __m512 V;
static inline V set1(float x) { return _mm512_set1_ps(x); }
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V load(const void* p) { return _mm512_loadu_ps((const float*)p); }
static inline V mix(V a, V b) { return _mm512_max_ps(a, b); }
#else
typedef __m256 V;
static inline V set1(float x) { return _mm256_set1_ps(x); }
static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V load(const void* p) { return _mm256_loadu_ps((const float*)p); }
static inline V mix(V a, V b) { return _mm256_max_ps(a, b); }
#endif
constexpr int W = sizeof(V) / 4;
constexpr int N = W == 16 ? 20 : 12;  // accumulators: enough to hide the latency, few enough to stay in registers

static inline float first(V v) {
    float out[W];
    __builtin_memcpy(out, &v, sizeof out);
    return out[0];
}

// `turns` rounds of multiply-adds on accumulators that depend on nothing but themselves. They start out different: equal
// ones would be merged. Loops over them are unrolled whole, so that they live in registers.
template <class Add> static inline float rounds(int turns, Add add) {
    V acc[N];
#pragma GCC unroll 20
    for (int i = 0; i < N; i++) acc[i] = set1((float)(i + 1));
    for (int turn = 0; turn < turns; turn++) {
#pragma GCC unroll 20
        for (int i = 0; i < N; i++) acc[i] = add(acc[i]);
        asm volatile("" ::: "memory");
    }
    V sum = acc[0];
#pragma GCC unroll 20
    for (int i = 1; i < N; i++) sum = mix(sum, acc[i]);
    return first(sum);
}

// f32 sums of f32 products. Element types that have no instruction of their own are widened for it.
struct F32 {
    static constexpr double OPS = 2.0 * W * N;
    static float run(int turns) {
        V zero = set1(0);
        return rounds(turns, [=](V acc) { return fma(zero, zero, acc); });
    }
};

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
// Tiles 0 to 3 gather, 4 to 7 are zero: four independent products of 16 x 32 and 32 x 16.
struct Bf16 {
    static constexpr double OPS = 4 * 2.0 * 16 * 16 * 32;
    static float run(int turns) {
        struct __attribute__((packed)) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
        // That the process may use tiles was asked with the choice of AMX.
        _tile_loadconfig(&config);
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
        for (int turn = 0; turn < turns; turn++) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        float out[256];
        _tile_stored(0, out, 64);
        _tile_release();
        return out[0];
    }
};
#elif defined(__AVX512BF16__)
struct Bf16 {
    static constexpr double OPS = 4.0 * W * N;
    static float run(int turns) {
        __m512bh zero = (__m512bh)_mm512_setzero_si512();
        return rounds(turns, [=](V acc) { return _mm512_dpbf16_ps(acc, zero, zero); });
    }
};
#else
typedef F32 Bf16;
#endif

// Operations a second of all threads, a multiply-add counted as two.
template <class Kind> static double peak(int threads) {
    constexpr int TURNS = 2000000;
    double start = 0, stop = 0;
    volatile float sink = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp barrier
#pragma omp master
        start = omp_get_wtime();
        if (Kind::run(TURNS) != 0) sink = 1;
#pragma omp barrier
#pragma omp master
        stop = omp_get_wtime();
    }
    return Kind::OPS * TURNS * threads / (stop - start);
}
EXPORT double peak_f32(int threads) { return peak<F32>(threads); }
EXPORT double peak_f16(int threads) { return peak<F32>(threads); }
EXPORT double peak_bf16(int threads) { return peak<Bf16>(threads); }

// Reads `bytes` once and returns bytes a second. Blocks are taken in turn by whoever is free, as the kernels take
// weights; a block is `rows` rows of `row` bytes that are read side by side, with lines asked for `ahead` bytes early.
EXPORT double bandwidth(const char* data, int64_t bytes, int threads, int64_t row, int64_t rows, int64_t ahead) {
    const int64_t block = row * rows;
    volatile float sink = 0;
    double start = omp_get_wtime();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t n = 0; n < bytes / block; n++) {
        const char* p = data + n * block;
        V a = set1(0), b = a, c = a, d = a;
        for (int64_t r = 0; r < rows; r += 4) {
            const char *p0 = p + r * row, *p1 = p0 + row, *p2 = p1 + row, *p3 = p2 + row;
            for (int64_t i = 0; i < row; i += 64) {
                if (ahead) {
                    _mm_prefetch(p0 + i + ahead, _MM_HINT_T0);
                    _mm_prefetch(p1 + i + ahead, _MM_HINT_T0);
                    _mm_prefetch(p2 + i + ahead, _MM_HINT_T0);
                    _mm_prefetch(p3 + i + ahead, _MM_HINT_T0);
                }
#pragma GCC unroll 2
                for (int64_t j = i; j < i + 64; j += (int64_t)sizeof(V)) {
                    a = mix(a, load(p0 + j)), b = mix(b, load(p1 + j));
                    c = mix(c, load(p2 + j)), d = mix(d, load(p3 + j));
                }
            }
        }
        if (first(mix(mix(a, b), mix(c, d))) > 1e30f) sink = 1;
    }
    return (bytes / block) * block / (omp_get_wtime() - start);
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
