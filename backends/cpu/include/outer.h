// Weights that lie with their outputs side by side ([K, N]): a vector of outputs times one value of a token at a time.
//
// Each output is one chain of additions in the order of K, whatever the tile.
#pragma once
#include "block.h"

namespace moec {

// What a step along K does: STEP rows of weights (from k) times the STEP values of a token, for a vector of outputs.
template <class T> struct Outer {
    static constexpr int STEP = 1, WIDE = 1;  // WIDE vectors of outputs come from one load
    using X = float;
    static inline void weights(const T* p, int64_t, bool, int n, V* v) { v[0] = n >= W ? load(p) : load_n(p, n); }
    static inline V token(const float* x) { return set1(*x); }
    static inline V add(V acc, V w, V x) { return fma(w, x, acc); }
    static inline void order(V*) {}
};

#if defined(__AVX512BF16__)
template <> struct Outer<bf16> {
    static constexpr int STEP = 2, WIDE = 2;
    using X = uint32_t;  // two values of K
    static inline void weights(const bf16* p, int64_t row, bool pair, int n, V* v) {
        __mmask32 mask = n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0;
        __m512i a = _mm512_maskz_loadu_epi16(mask, p), b = _mm512_setzero_si512();
        if (pair) b = _mm512_maskz_loadu_epi16(mask, (const char*)p + row);
        v[0] = (V)_mm512_unpacklo_epi16(a, b);
        v[1] = (V)_mm512_unpackhi_epi16(a, b);
    }
    static inline V token(const uint32_t* x) { return (V)_mm512_set1_epi32((int)*x); }
    static inline V add(V acc, V w, V x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
    // Unpacking works in 128-bit lanes: put the outputs of both vectors in their order.
    static inline void order(V* v) {
        const __m512i lo = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
        const __m512i hi = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
        V a = v[0], b = v[1];
        v[0] = _mm512_permutex2var_ps(a, lo, b);
        v[1] = _mm512_permutex2var_ps(a, hi, b);
    }
};
#endif

// NV vectors of outputs for M tokens. x: packed as for dot_tile, in values of Outer<T>::X; n: how many outputs there are.
template <class T, int M, int NV, int K>
static inline void outer_tile(const char* w, int64_t row, int n, const typename Outer<T>::X* x, float* c, int ldc) {
    using O = Outer<T>;
    constexpr int RUN = Chunk<T>::STEP, STEPS = RUN / O::STEP;
    V acc[M][NV];
    for (int t = 0; t < M; t++)
        for (int v = 0; v < NV; v++) acc[t][v] = zero();
    auto step = [&](const char* from, const typename O::X* xs, bool pair) __attribute__((always_inline)) {
        V wv[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; v += O::WIDE) O::weights((const T*)from + v * W, row, pair, n - v * W, wv + v);
#pragma GCC unroll 6
        for (int t = 0; t < M; t++) {
            V xv = O::token(xs + t * STEPS);
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) acc[t][v] = O::add(acc[t][v], wv[v], xv);
        }
    };
    for (int k = 0; k < K; k += RUN)
        for (int i = 0; i < STEPS && k + i * O::STEP < K; i++) {
            const int at = k + i * O::STEP;
            step(w + at * row, x + k / O::STEP * M + i, at + O::STEP <= K);
        }
    for (int t = 0; t < M; t++) {
        for (int v = 0; v < NV; v += O::WIDE) O::order(acc[t] + v);
        for (int v = 0; v < NV; v++) store_n(c + t * ldc + v * W, acc[t][v], W);
    }
}

constexpr int OUTER_VECTORS = 4;

template <class T, int K>
static __attribute__((noinline)) void outer_rows(int m, const char* w, int64_t row, int n, const typename Outer<T>::X* x, float* c,
                                                 int ldc) {
    constexpr int NV = OUTER_VECTORS;
    switch (m) {
        case 1: return outer_tile<T, 1, NV, K>(w, row, n, x, c, ldc);
        case 2: return outer_tile<T, 2, NV, K>(w, row, n, x, c, ldc);
        case 3: return outer_tile<T, 3, NV, K>(w, row, n, x, c, ldc);
#if defined(__AVX512F__)
        case 4: return outer_tile<T, 4, NV, K>(w, row, n, x, c, ldc);
        case 5: return outer_tile<T, 5, NV, K>(w, row, n, x, c, ldc);
        case 6: return outer_tile<T, 6, NV, K>(w, row, n, x, c, ldc);
#endif
    }
}

// A tile's values as the kernel reads them: in place, or widened into `wide`.
template <class T> static inline const float* values(const T* x, int count, float* wide, const float*) {
    for (int i = 0; i < count; i += W) store_n(wide + i, load(x + i), W);
    return wide;
}
static inline const float* values(const float* x, int, float*, const float*) { return x; }
template <class T> static inline const uint32_t* values(const T* x, int, float*, const uint32_t*) { return (const uint32_t*)x; }

// As dot_block, for weights whose rows are K. wide: room for a tile's values as floats, where T is narrow.
template <class T, int K, int PARTS, class Done>
static inline void outer_block(const char* const* w, int64_t row, int n, const T* x, Tiles tiles, float* wide, Done&& done) {
    constexpr int WIDTH = OUTER_VECTORS * W, LDC = 2 * BLOCK;
    alignas(64) float c[TILE_TOKENS * LDC + 2 * W];
    for (int tile = 0; tile < tiles.count; tile++) {
        const int t0 = tiles.start(tile), mt = tiles.size(tile);
        const typename Outer<T>::X* kind = nullptr;
        const auto* xs = values(x + (int64_t)t0 * PADDED<T, K>, mt * PADDED<T, K>, wide, kind);
        for (int part = 0; part < PARTS; part++)
            for (int at = 0; at < n; at += WIDTH)
                outer_rows<T, K>(mt, w[part] + at * sizeof(T), row, n - at, xs, c + part * BLOCK + at, LDC);
        done(t0, mt, c, LDC);
    }
}

}  // namespace moec
