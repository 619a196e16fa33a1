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

constexpr int OUTER_VECTORS = 4, OUTER_WIDTH = OUTER_VECTORS * W;  // of a tile
constexpr int OUTER_BLOCK = 256;   // columns of a task
constexpr int OUTER_STEPS = 128;   // steps along K between two visits of a tile
constexpr int OUTER_SEGMENT = 256; // most rows of a task
// A thread's room: a slice of weights ready for use, and the sums so far.
constexpr int64_t OUTER_BYTES = sizeof(float) * OUTER_BLOCK * (OUTER_STEPS + OUTER_SEGMENT);

// The slice of weights that comes next, a row of lines after the other; `step` lines are asked for in each step along K.
struct AheadRows {
    const char* at;
    int64_t row;
    int line, lines, across, step;

    inline __attribute__((always_inline)) void fetch() {
        for (int i = 0; i < step && line < lines; i++, line++)
            _mm_prefetch(at + line / across * row + line % across * 64, _MM_HINT_T1);
    }
};

// One slice [k0, k1) of K for M tokens and OUTER_WIDTH outputs, added to c. READY: w is a slice in the form of
// Outer<T>::weights, `row` bytes a step; otherwise it is the matrix. x: packed as for dot_tile, in values of X.
template <class T, int M, bool READY>
static inline __attribute__((always_inline)) void outer_tile(const char* w, int64_t row, int n, const typename Outer<T>::X* x, int k0,
                                                             int k1, bool last, float* c, int ldc, AheadRows& ahead) {
    using O = Outer<T>;
    constexpr int RUN = Chunk<T>::STEP, STEPS = RUN / O::STEP, NV = OUTER_VECTORS;
    V acc[M][NV];
    for (int t = 0; t < M; t++)
        for (int v = 0; v < NV; v++) acc[t][v] = k0 ? load(c + t * ldc + v * W) : zero();
    for (int k = k0; k < k1; k += RUN)
        for (int i = 0; i < STEPS && k + i * O::STEP < k1; i++) {
            const int at = k + i * O::STEP;
            const auto* xs = x + (k - k0) / O::STEP * M + i;
            ahead.fetch();
            V wv[NV];
            if constexpr (READY) {
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) wv[v] = load((const float*)(w + (at - k0) / O::STEP * row) + v * W);
            } else {
#pragma GCC unroll 4
                for (int v = 0; v < NV; v += O::WIDE)
                    O::weights((const T*)(w + at * row) + v * W, row, at + O::STEP <= k1, n - v * W, wv + v);
            }
#pragma GCC unroll 6
            for (int t = 0; t < M; t++) {
                V xv = O::token(xs + t * STEPS);
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) acc[t][v] = O::add(acc[t][v], wv[v], xv);
            }
        }
    for (int t = 0; t < M; t++) {
        if (last)
            for (int v = 0; v < NV; v += O::WIDE) O::order(acc[t] + v);
        for (int v = 0; v < NV; v++) store_n(c + t * ldc + v * W, acc[t][v], W);
    }
}

template <class T, bool READY>
static __attribute__((noinline)) void outer_rows(int m, const char* w, int64_t row, int n, const typename Outer<T>::X* x, int k0,
                                                 int k1, bool last, float* c, int ldc, AheadRows& ahead) {
    switch (m) {
        case 1: return outer_tile<T, 1, READY>(w, row, n, x, k0, k1, last, c, ldc, ahead);
        case 2: return outer_tile<T, 2, READY>(w, row, n, x, k0, k1, last, c, ldc, ahead);
        case 3: return outer_tile<T, 3, READY>(w, row, n, x, k0, k1, last, c, ldc, ahead);
#if defined(__AVX512F__)
        case 4: return outer_tile<T, 4, READY>(w, row, n, x, k0, k1, last, c, ldc, ahead);
        case 5: return outer_tile<T, 5, READY>(w, row, n, x, k0, k1, last, c, ldc, ahead);
        case 6: return outer_tile<T, 6, READY>(w, row, n, x, k0, k1, last, c, ldc, ahead);
#endif
    }
}

// The slice [k0, k1) of n outputs as Outer<T>::weights gives it, a step along K after the other.
template <class T> static inline void ready_slice(const char* w, int64_t row, int n, int k0, int k1, float* to) {
    using O = Outer<T>;
    for (int k = k0; k < k1; k += O::STEP, to += OUTER_BLOCK)
        for (int at = 0; at < n; at += O::WIDE * W) {
            V v[O::WIDE];
            O::weights((const T*)(w + k * row) + at, row, k + O::STEP <= k1, n - at, v);
            for (int i = 0; i < O::WIDE; i++) store_n(to + at + i * W, v[i], W);
        }
}

// A tile's values as the kernel reads them: in place, or widened into `wide`.
template <class T> static inline const float* values(const T* x, int count, float* wide, const float*) {
    for (int i = 0; i < count; i += W) store_n(wide + i, load(x + i), W);
    return wide;
}
static inline const float* values(const float* x, int, float*, const float*) { return x; }
template <class T> static inline const uint32_t* values(const T* x, int, float*, const uint32_t*) { return (const uint32_t*)x; }

// As dot_block, for weights whose rows are K. K is cut into slices; a slice of the block's weights is fetched while the
// one before is used, and made ready once if there are several tiles of tokens. room: OUTER_BYTES of this thread.
template <class T, int K, int PARTS, class Done>
static inline void outer_block(const char* const* w, int64_t row, int n, const T* x, Tiles tiles, const Next& next, float* room,
                               Done&& done) {
    using O = Outer<T>;
    constexpr int SLICE = OUTER_STEPS * O::STEP, HALF = OUTER_BLOCK / 2;
    alignas(64) float wide[TILE_TOKENS * SLICE];
    float *ready = room, *sums = room + OUTER_BLOCK * OUTER_STEPS;
    const bool several = tiles.count > 1;
    const int across = (n * (int)sizeof(T) + 63) / 64 + 1, groups = (n + OUTER_WIDTH - 1) / OUTER_WIDTH;
    for (int k0 = 0; k0 < K; k0 += SLICE) {
        const int k1 = k0 + SLICE < K ? k0 + SLICE : K;
        for (int part = 0; part < PARTS; part++) {
            // What comes after this slice: the next of this part, or the first of the next block.
            const char* after = k1 < K ? w[part] + (int64_t)k1 * row : next.at[part];
            const int left = k1 < K ? (K - k1 < SLICE ? K - k1 : SLICE) : (K < SLICE ? K : SLICE);
            const int lines = after ? left * across : 0, calls = tiles.count * groups * (OUTER_STEPS / 4);
            AheadRows ahead{after, row, 0, lines, across, (lines + 4 * calls - 1) / (4 * calls)};
            if (several) ready_slice<T>(w[part], row, n, k0, k1, ready);
            for (int tile = 0; tile < tiles.count; tile++) {
                const int t0 = tiles.start(tile), mt = tiles.size(tile);
                const typename O::X* kind = nullptr;
                const T* from = x + (int64_t)t0 * PADDED<T, K> + (int64_t)k0 * mt;
                const auto* xs = values(from, mt * up_to(k1 - k0, Chunk<T>::STEP), wide, kind);
                for (int at = 0; at < n; at += OUTER_WIDTH) {
                    float* c = sums + t0 * OUTER_BLOCK + part * HALF + at;
                    if (several)
                        outer_rows<T, true>(mt, (const char*)(ready + at), OUTER_BLOCK * sizeof(float), n - at, xs, k0, k1, k1 == K, c,
                                            OUTER_BLOCK, ahead);
                    else
                        outer_rows<T, false>(mt, w[part] + at * sizeof(T), row, n - at, xs, k0, k1, k1 == K, c, OUTER_BLOCK, ahead);
                }
            }
        }
    }
    for (int tile = 0; tile < tiles.count; tile++)
        done(tiles.start(tile), tiles.size(tile), sums + tiles.start(tile) * OUTER_BLOCK, OUTER_BLOCK);
}

}  // namespace moec
