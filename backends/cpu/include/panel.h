// Weights as the tile kernel reads them: for every step along K, the outputs side by side.
//
// A block of a weight matrix is brought into this form once, slice by slice along K, in the first cache; then all tokens
// of the expert pass over it. Nothing of it is kept: the next call reads the weights where they lie again.
#pragma once
#include "types.h"

namespace moec {

#if defined(__AVX512F__)
constexpr int VECTORS = 4;  // of outputs in a tile
#else
constexpr int VECTORS = 2;
#endif
constexpr int GROUP = VECTORS * W;  // outputs of a tile
constexpr int STEPS = 128;          // steps along K in a slice: a panel takes 32 KB with AVX-512, 8 KB without

// A step along K: DEPTH elements of it, 4 bytes in all, as X for tokens and as a lane of V for weights.
template <class T> struct Step {
    static constexpr int DEPTH = 1;
    using X = float;
    // W steps of one row; row_n: those of its first n elements, zeros after them.
    static inline V row(const T* p) { return load(p); }
    static inline V row_n(const T* p, int n) { return load_n(p, n); }
    // One step of DEPTH * W outputs that lie side by side, of which there are n.
    static inline void outputs(const T* p, int64_t, int, int n, V* v) { v[0] = n >= W ? load(p) : load_n(p, n); }
    static inline V token(const X* x) { return set1(*x); }
    static inline V add(V acc, V w, V x) { return fma(w, x, acc); }
    // W activations, rounded to T.
    static inline void put(X* to, V a) { store_n(to, round_to<T>(a), W); }
};

#if defined(__AVX512BF16__)
template <> struct Step<bf16> {
    static constexpr int DEPTH = 2;
    using X = uint32_t;
    static inline V row(const bf16* p) { return _mm512_loadu_ps(p); }
    static inline V row_n(const bf16* p, int n) { return (V)_mm512_maskz_loadu_epi16(mask(n), p); }
    // `left` elements of K are left: with one, the second row of the pair is zero.
    static inline void outputs(const bf16* p, int64_t row, int left, int n, V* v) {
        const __m512i lo = pairs(0), hi = pairs(16);
        __m512i a = _mm512_maskz_loadu_epi16(mask(n), p), b = _mm512_setzero_si512();
        if (left > 1) b = _mm512_maskz_loadu_epi16(mask(n), (const char*)p + row);
        v[0] = (V)_mm512_permutex2var_epi16(a, lo, b);
        v[1] = (V)_mm512_permutex2var_epi16(a, hi, b);
    }
    static inline V token(const X* x) { return (V)_mm512_set1_epi32((int)*x); }
    static inline V add(V acc, V w, V x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
    static inline void put(X* to, V a) { store_n((bf16*)to, a, W); }

    static inline __mmask32 mask(int n) { return n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0; }
    static inline __m512i pairs(int first) {  // elements first, 32 + first, first + 1, 32 + first + 1, ...
        __m512i even = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        return _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(32)), 16));
    }
};
#endif

template <class T> constexpr int SLICE = STEPS * Step<T>::DEPTH;  // elements of K in a slice
template <class T> constexpr int RUN = W * Step<T>::DEPTH;        // elements of K in W steps

// The panel [STEPS][GROUP] of n outputs (at most a group) and `count` elements of K, up to whole runs. Rows of w (NK: one
// an output; else one an element of K) are `row` bytes apart.
template <class T, bool NK> static inline void fill_panel(const char* w, int64_t row, int n, int count, float* panel) {
    using S = Step<T>;
    if constexpr (NK) {
        for (int at = 0; at < GROUP; at += W) {
            float* to = panel + at;
            const char* rows[W];  // past the last output there is nothing to read: it stands in
            for (int i = 0; i < W; i++) rows[i] = w + (int64_t)(at + i < n ? at + i : n - 1) * row;
            for (int k = 0; k < count; k += RUN<T>, to += W * GROUP) {
                V r[W];
                if (k + RUN<T> <= count) {
#pragma GCC unroll 16
                    for (int i = 0; i < W; i++) r[i] = S::row((const T*)rows[i] + k);
                } else {
                    for (int i = 0; i < W; i++) r[i] = S::row_n((const T*)rows[i] + k, count - k);
                }
                transpose(r);
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) store(to + i * GROUP, r[i]);
            }
        }
    } else {
        for (int k = 0; k < (count + RUN<T> - 1) / RUN<T> * RUN<T>; k += S::DEPTH, panel += GROUP)
#pragma GCC unroll 4
            for (int at = 0; at < GROUP; at += S::DEPTH * W) {
                V v[S::DEPTH];
                if (k < count && at < n) S::outputs((const T*)(w + k * row) + at, row, count - k, n - at, v);
                else
                    for (int i = 0; i < S::DEPTH; i++) v[i] = zero();
                for (int i = 0; i < S::DEPTH; i++) store(panel + at + i * W, v[i]);
            }
    }
}

}  // namespace moec
