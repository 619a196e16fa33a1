// Rows of weights, read where they lie, times packed rows of tokens: every output is a dot product along K.
//
// An output is a vector of partial sums over the whole length (or over each block of K, whose ends depend on K alone)
// and then one tree of additions. Neither depends on how many rows a tile has, so a token's result has the same bits
// whatever its neighbours.
#pragma once
#include "types.h"

namespace moec {

#if defined(__AVX512F__)
constexpr int TILE_TOKENS = 6;
#else
constexpr int TILE_TOKENS = 3;
#endif
constexpr int TILE_ROWS = 4;

template <class T> struct Chunk;

template <> struct Chunk<float> {
    static constexpr int STEP = W;
    V v;
    static inline Chunk get(const float* p) { return {load(p)}; }
    static inline Chunk get_n(const float* p, int n) { return {load_n(p, n)}; }
    static inline void add(V& acc, const Chunk& a, const Chunk& b) { acc = fma(a.v, b.v, acc); }
};

template <> struct Chunk<f16> {
    static constexpr int STEP = W;
    V v;
    static inline Chunk get(const f16* p) { return {load(p)}; }
    static inline Chunk get_n(const f16* p, int n) { return {load_n(p, n)}; }
    static inline void add(V& acc, const Chunk& a, const Chunk& b) { acc = fma(a.v, b.v, acc); }
};

#if defined(__AVX512BF16__)
template <> struct Chunk<bf16> {
    static constexpr int STEP = 32;
    __m512bh v;
    static inline Chunk get(const bf16* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
    static inline Chunk get_n(const bf16* p, int n) {
        return {(__m512bh)_mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, p)};
    }
    static inline void add(V& acc, const Chunk& a, const Chunk& b) { acc = _mm512_dpbf16_ps(acc, a.v, b.v); }
};
#else
// Even and odd elements apart: a shift and a mask make floats of them, and both operands are permuted alike.
template <> struct Chunk<bf16> {
    static constexpr int STEP = 2 * W;
    V even, odd;
#if defined(__AVX512F__)
    static inline Chunk split(__m512i b) {
        __m512i high = _mm512_set1_epi32((int)0xffff0000);
        return {_mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), _mm512_castsi512_ps(_mm512_and_si512(b, high))};
    }
    static inline Chunk get(const bf16* p) { return split(_mm512_loadu_si512(p)); }
#else
    static inline Chunk split(__m256i b) {
        __m256i high = _mm256_set1_epi32((int)0xffff0000);
        return {_mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), _mm256_castsi256_ps(_mm256_and_si256(b, high))};
    }
    static inline Chunk get(const bf16* p) { return split(_mm256_loadu_si256((const __m256i*)p)); }
#endif
    static inline Chunk get_n(const bf16* p, int n) {
        bf16 whole[STEP] = {};
        memcpy(whole, p, sizeof(bf16) * n);
        return get(whole);
    }
    static inline void add(V& acc, const Chunk& a, const Chunk& b) {
        acc = fma(a.even, b.even, acc);
        acc = fma(a.odd, b.odd, acc);
    }
};
#endif

// Lines of weights that are wanted soon. `lines` of them are asked for in every step along K.
struct Ahead {
    const char* at;
    int lines;
};

// c[t * ldc + r] (+)= sum over K values of w[r][k] * x[t][k], for TILE_ROWS rows and M tokens.
// x is packed: for each chunk of STEP values of K those of token 0, of token 1 and so on, zeros past the end.
template <class T, int M, int K>
static inline __attribute__((always_inline)) void dot_tile(const T* const* w, const T* x, float* c, int ldc, bool add, Ahead ahead) {
    using C = Chunk<T>;
    constexpr int R = TILE_ROWS, WHOLE = K / C::STEP * C::STEP;
    V acc[R][M];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < M; t++) acc[r][t] = zero();
    const T* wp[R];
    for (int r = 0; r < R; r++) wp[r] = w[r];
    const char* line = ahead.at;
    for (int k = 0; k < WHOLE; k += C::STEP) {
        if (ahead.lines > 0) {
            _mm_prefetch(line, _MM_HINT_T0);
            if (ahead.lines > 1) _mm_prefetch(line + 64, _MM_HINT_T0);
            if (ahead.lines > 2) {
                _mm_prefetch(line + 128, _MM_HINT_T0);
                _mm_prefetch(line + 192, _MM_HINT_T0);
            }
            line += 64 * ahead.lines;
        }
        C wc[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) wc[r] = C::get(wp[r] + k);
#pragma GCC unroll 6
        for (int t = 0; t < M; t++) {
            C xc = C::get(x + k * M + t * C::STEP);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) C::add(acc[r][t], wc[r], xc);
        }
    }
    if constexpr (K > WHOLE) {
        C wc[R];
        for (int r = 0; r < R; r++) wc[r] = C::get_n(wp[r] + WHOLE, K - WHOLE);
        for (int t = 0; t < M; t++) {
            C xc = C::get(x + WHOLE * M + t * C::STEP);
            for (int r = 0; r < R; r++) C::add(acc[r][t], wc[r], xc);
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < M; t += FOLD) {
        V u[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            V v[FOLD];
#pragma GCC unroll 4
            for (int j = 0; j < FOLD; j++) v[j] = t + j < M ? acc[r][t + j < M ? t + j : 0] : zero();
            u[r] = fold(v);
        }
        V sums = finish(u);
#pragma GCC unroll 4
        for (int j = 0; j < FOLD; j++)
            if (t + j < M) put_lane(c + (t + j) * ldc, sums, j, add);
    }
}

template <class T, int K>
static __attribute__((noinline)) void dot_rows(int m, const T* const* w, const T* x, float* c, int ldc, bool add, Ahead ahead) {
    switch (m) {
        case 1: return dot_tile<T, 1, K>(w, x, c, ldc, add, ahead);
        case 2: return dot_tile<T, 2, K>(w, x, c, ldc, add, ahead);
        case 3: return dot_tile<T, 3, K>(w, x, c, ldc, add, ahead);
#if defined(__AVX512F__)
        case 4: return dot_tile<T, 4, K>(w, x, c, ldc, add, ahead);
        case 5: return dot_tile<T, 5, K>(w, x, c, ldc, add, ahead);
        case 6: return dot_tile<T, 6, K>(w, x, c, ldc, add, ahead);
#endif
    }
}

}  // namespace moec
