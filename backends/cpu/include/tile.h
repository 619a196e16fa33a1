// The tile kernel: a few tokens times the outputs of one group of a panel, with the weights that come next fetched ahead.
//
// Every output is one chain of multiply-adds along a slice of K, and slices are added in their order. Neither depends on
// how many tokens a tile or an expert has, so a token's result has the same bits whatever its neighbours.
#pragma once
#include "panel.h"

namespace moec {

constexpr int TILE_TOKENS = 6;

// Lines of memory that are wanted soon: runs of `across` lines, `row` bytes apart.
struct Ahead {
    const char* at;
    int64_t row;
    int left, across, in_run;
    int pace;  // above 0: a line in every pace-th step (a power of two); below: -pace lines in every step; 0: none

    // `rows` runs of `bytes` each, spread over `steps` steps.
    static Ahead over(const char* at, int64_t row, int rows, int64_t bytes, int64_t steps) {
        const int across = (int)((bytes + 63) / 64), left = at ? rows * across : 0;
        int pace = left ? 1 : 0;
        if (left > steps) pace = left > 2 * steps ? -4 : -2;
        else
            while (pace && pace < W && steps >= 2 * (int64_t)pace * left) pace *= 2;
        return {at, row, left, across, across, pace};
    }
    // NEAR: into the first cache; else into the second, where the slice is more than the first holds.
    template <bool NEAR> inline __attribute__((always_inline)) void line() {
        if (left <= 0) return;
        left--;
        _mm_prefetch(at, NEAR ? _MM_HINT_T0 : _MM_HINT_T1);
        at += 64;
        if (--in_run == 0) {
            at += row - 64 * (int64_t)across;
            in_run = across;
        }
    }
    template <bool NEAR> inline __attribute__((always_inline)) void step(int i) {
        if (pace > 0) {
            if ((i & (pace - 1)) == 0) line<NEAR>();
        } else if (pace < 0) {
            line<NEAR>();
            line<NEAR>();
            if (pace < -2) {
                line<NEAR>();
                line<NEAR>();
            }
        }
    }
};

// c[t * ldc + n] (+)= sum over `runs` runs of K. x: [run][M][W] steps.
template <class T, bool NEAR, int M>
static inline __attribute__((always_inline)) void tile(const float* panel, const typename Step<T>::X* x, int runs, float* c, int ldc,
                                                       bool add, Ahead& ahead) {
    using S = Step<T>;
    V acc[M][VECTORS];
#pragma GCC unroll 6
    for (int t = 0; t < M; t++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) acc[t][v] = zero();
    for (int run = 0; run < runs; run++, x += W * M, panel += W * GROUP)
#pragma GCC unroll 4
        for (int i = 0; i < W; i++) {
            ahead.template step<NEAR>(i);
            V w[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) w[v] = load(panel + i * GROUP + v * W);
#pragma GCC unroll 6
            for (int t = 0; t < M; t++) {
                const V xv = S::token(x + t * W + i);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) acc[t][v] = S::add(acc[t][v], w[v], xv);
            }
        }
#pragma GCC unroll 6
    for (int t = 0; t < M; t++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            float* to = c + t * ldc + v * W;
            store(to, add ? load(to) + acc[t][v] : acc[t][v]);
        }
}

template <class T, bool NEAR>
static __attribute__((noinline)) void tile_of(int m, const float* panel, const typename Step<T>::X* x, int runs, float* c, int ldc,
                                              bool add, Ahead& ahead) {
    switch (m) {
        case 1: return tile<T, NEAR, 1>(panel, x, runs, c, ldc, add, ahead);
        case 2: return tile<T, NEAR, 2>(panel, x, runs, c, ldc, add, ahead);
        case 3: return tile<T, NEAR, 3>(panel, x, runs, c, ldc, add, ahead);
        case 4: return tile<T, NEAR, 4>(panel, x, runs, c, ldc, add, ahead);
        case 5: return tile<T, NEAR, 5>(panel, x, runs, c, ldc, add, ahead);
        case 6: return tile<T, NEAR, 6>(panel, x, runs, c, ldc, add, ahead);
    }
}

}  // namespace moec
