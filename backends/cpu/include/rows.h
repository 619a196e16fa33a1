// What functions of whole rows are made of, beside the arithmetic of vectors.
#pragma once
#include "lanes.h"
#include "math.h"

namespace moec {

// Floats of a row in working memory: a slice of it may be read one vector past its end.
constexpr int padded_row(int n) { return (n + 15) / 16 * 16 + 16; }

// A row of N elements as floats, zeros up to the next whole vector.
template <int N, class T> static inline void widen_row(const T* row, float* to) {
    for (int i = 0; i < N; i += W) store(to + i, i + W <= N ? load(row + i) : load_n(row + i, N - i));
}

// Elements i .. i + W - 1 of N, zeros past the last.
template <int N, class T> static inline V load_to(const T* p, int i) { return i + W <= N ? load(p + i) : load_n(p + i, N - i); }

// Elements i .. i + W - 1 of the N that lie STEP apart.
template <int N, int STEP> static inline V every(const float* p, int i) {
    alignas(64) float found[W] = {};
    for (int lane = 0; lane < W && i + lane < N; lane++) found[lane] = p[(i + lane) * STEP];
    return load(found);
}

// The largest lane in all of them; NaN where one is.
static inline V largest_lane(V a) { return nans(a) ? set1(__builtin_nanf("")) : set1(highest(a)); }

}  // namespace moec
