// Few tokens: weights go from memory through registers, W outputs at a time, and no panel is filled for them.
//
// With few rows an expert's weights are all that costs. A panel would be written and read again for one or two tiles, and
// memory would wait meanwhile. The multiply-adds and their order are those of the tile kernel, so the bits are too.
#pragma once
#include "tile.h"

namespace moec {

#if defined(__AVX512F__)
constexpr int DIRECT_TOKENS = 12;  // more of them, with a vector for each, no longer fit beside the W rows
#else
constexpr int DIRECT_TOKENS = 4;
#endif

// c[t * ldc + n] = sum over `count` elements of K, for W outputs and two tiles of M0 and M1 tokens (the second from x1 on).
// Rows are `row` bytes apart, and n of the W are there. next: the rows that this thread reads then.
template <class T, int M0, int M1>
static __attribute__((noinline)) void direct(const char* w, int64_t row, int n, const char* next, const typename Step<T>::X* x0,
                                             const typename Step<T>::X* x1, int count, float* c, int ldc) {
    using S = Step<T>;
    constexpr int M = M0 + M1, LINES = W * RUN<T> * (int)sizeof(T) / 64;  // of weights in a run
    // The next rows are fetched in the order in which they lie, as memory likes it best, if nothing is between them.
    const bool gapless = row == count * (int64_t)sizeof(T);
    for (int k0 = 0; k0 < count; k0 += SLICE<T>) {
        const int stop = count - k0 < SLICE<T> ? count : k0 + SLICE<T>;
        V acc[M];
#pragma GCC unroll 12
        for (int t = 0; t < M; t++) acc[t] = zero();
        for (int k = k0; k < stop; k += RUN<T>, x0 += W * M0, x1 += W * M1) {
            const char* soon = next + (gapless ? k / RUN<T> * LINES * 64 : k * (int64_t)sizeof(T));
            const int64_t step = gapless ? 64 : row * (W / LINES);
            V r[W];
            if (n == W && k + RUN<T> <= count) {
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) {
                    if (i % (W / LINES) == 0) _mm_prefetch(soon + i / (W / LINES) * step, _MM_HINT_T0);
                    r[i] = S::row((const T*)(w + i * row) + k);
                }
            } else {
                for (int i = 0; i < W; i++) r[i] = S::row_n((const T*)(w + (i < n ? i : n - 1) * row) + k, count - k < RUN<T> ? count - k : RUN<T>);
            }
            transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) {
#pragma GCC unroll 12
                for (int t = 0; t < M0; t++) acc[t] = S::add(acc[t], r[i], S::token(x0 + t * W + i));
#pragma GCC unroll 12
                for (int t = 0; t < M1; t++) acc[M0 + t] = S::add(acc[M0 + t], r[i], S::token(x1 + t * W + i));
            }
        }
#pragma GCC unroll 12
        for (int t = 0; t < M; t++) store(c + t * ldc, k0 ? load(c + t * ldc) + acc[t] : acc[t]);
    }
}

template <class T>
static inline void direct_of(int tokens, const char* w, int64_t row, int n, const char* next, const typename Step<T>::X* x0,
                             const typename Step<T>::X* x1, int count, float* c, int ldc) {
    switch (tokens) {
        case 1: return direct<T, 1, 0>(w, row, n, next, x0, x1, count, c, ldc);
        case 2: return direct<T, 2, 0>(w, row, n, next, x0, x1, count, c, ldc);
        case 3: return direct<T, 3, 0>(w, row, n, next, x0, x1, count, c, ldc);
        case 4: return direct<T, 4, 0>(w, row, n, next, x0, x1, count, c, ldc);
#if defined(__AVX512F__)
        case 5: return direct<T, 5, 0>(w, row, n, next, x0, x1, count, c, ldc);
        case 6: return direct<T, 6, 0>(w, row, n, next, x0, x1, count, c, ldc);
        case 7: return direct<T, 4, 3>(w, row, n, next, x0, x1, count, c, ldc);
        case 8: return direct<T, 4, 4>(w, row, n, next, x0, x1, count, c, ldc);
        case 9: return direct<T, 5, 4>(w, row, n, next, x0, x1, count, c, ldc);
        case 10: return direct<T, 5, 5>(w, row, n, next, x0, x1, count, c, ldc);
        case 11: return direct<T, 6, 5>(w, row, n, next, x0, x1, count, c, ldc);
        case 12: return direct<T, 6, 6>(w, row, n, next, x0, x1, count, c, ldc);
#endif
    }
}

}  // namespace moec
