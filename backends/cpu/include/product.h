// GEMMs whose sizes are known when they run, by the same panels and tiles as the forward's: rows times a weight matrix,
// and the products over the rows of an expert that give a weight's gradient.
#pragma once
#include "lanes.h"
#include "sweep.h"

namespace moec {

// Part of a weight matrix: n outputs, k elements of K, of which its rows are either (nk: a row is an output).
struct Operand {
    const char* at;
    int64_t row;  // bytes
    int n, k;
    bool nk;
};

// The slice from k0 on, to be fetched during so many steps.
template <class T> static inline Ahead slice_ahead(const Operand& w, int k0, int64_t steps) {
    const int length = w.k - k0 < SLICE<T> ? w.k - k0 : SLICE<T>;
    if (!w.at) return Ahead::over(nullptr, 0, 0, 0, steps);
    if (w.nk) return Ahead::over(w.at + k0 * (int64_t)sizeof(T), w.row, w.n, length * (int64_t)sizeof(T), steps);
    return Ahead::over(w.at + k0 * w.row, w.row, length, w.n * (int64_t)sizeof(T), steps);
}

// Steps of a packed row of k elements.
template <class T> static inline int padded(int k) { return up_to(k, RUN<T>) / Step<T>::DEPTH; }

// sums[t * ldc + n] (+)= x w. x: rows packed in `tiles`; next: what this thread multiplies with after this.
template <class T>
static __attribute__((noinline)) void product(const Operand& w, const Packed<T>* x, typename Sweep<T>::Tiles tiles, float* sums, int ldc,
                                              bool add, const Operand& next, float* panel) {
    constexpr int LENGTH = SLICE<T>;
    Sweep<T> sweep;
    for (int k0 = 0; k0 < w.k; k0 += LENGTH) {
        const int length = w.k - k0 < LENGTH ? w.k - k0 : LENGTH, runs = padded<T>(length) / W;
        const int64_t steps = Sweep<T>::steps(tiles.count, w.n, runs);
        Ahead soon = k0 + LENGTH < w.k ? slice_ahead<T>(w, k0 + LENGTH, steps) : slice_ahead<T>(next, 0, steps);
        for (int g = 0; g < w.n; g += GROUP) {
            const int n = w.n - g < GROUP ? w.n - g : GROUP;
            if (w.nk) fill_panel<T, true>(w.at + k0 * (int64_t)sizeof(T) + g * w.row, w.row, n, length, panel);
            else fill_panel<T, false>(w.at + k0 * w.row + g * (int64_t)sizeof(T), w.row, n, length, panel);
            auto of = [&](int t) {
                const int t0 = tiles.start(t), size = tiles.size(t);
                return Packet<T>{x + (int64_t)t0 * padded<T>(w.k) + (int64_t)k0 / Step<T>::DEPTH * size, size, sums + t0 * ldc + g};
            };
            sweep.over(panel, n, runs, 0, tiles.count, of, ldc, add || k0 > 0, soon);
        }
    }
}

// The rows of an expert in a tensor of tokens.
struct Rows {
    const char* base;
    int64_t row;           // bytes
    const int32_t* order;  // the expert's slots
    int64_t top_k;
    int count;

    const char* of(int r) const { return base + order[r] / top_k * row; }
};

// Columns of rows, packed for tiles: a tile has some columns side by side along all rows, [run of rows][column][W].
template <class T> struct Columns {
    static constexpr int TILE = Sweep<T>::ROWS;
    Packed<T>* base;
    int count, rows;  // columns; rows, whole runs

    int size(int tile) const { return count - tile * TILE < TILE ? count - tile * TILE : TILE; }
    Packed<T>* tile(int t) const { return base + (int64_t)t * TILE * rows / Step<T>::DEPTH; }
    Packed<T>* at(int column, int row) const {
        const int t = column / TILE;
        return packed_at<T>(tile(t), size(t), column % TILE, row);
    }
    float sum(int column) const {
        V s = zero();
        for (int r = 0; r < rows; r += W) s = s + load_packed(at(column, r));
        return sum_lanes(s);
    }
    // W columns from `column` on, `by` apart, of which n are there: W rows of them, which are lost.
    void put(int column, int by, int n, int row, V* rows_of_columns) const {
        transpose(rows_of_columns);
        for (int q = 0; q < W && q < n; q++) Step<T>::put(at(column + q * by, row), rows_of_columns[q]);
    }
    static V load_packed(const Packed<T>* p) {
        if constexpr (Step<T>::DEPTH == 2) return load((const T*)p);
        else return load(p);
    }
};

// The panel whose elements of K are `count` rows of tokens, its outputs the first n elements from `skip` bytes on.
template <class T> static inline void fill_rows(const char* const* rows, int count, int64_t skip, int n, float* panel) {
    using S = Step<T>;
    for (int k = 0; k < up_to(count, RUN<T>); k += S::DEPTH, panel += GROUP) {
        const char* p = k < count ? rows[k] + skip : nullptr;
        const int64_t next = k + 1 < count ? rows[k + 1] - rows[k] : 0;
#pragma GCC unroll 4
        for (int at = 0; at < GROUP; at += S::DEPTH * W) {
            V v[S::DEPTH];
            if (p && at < n) S::outputs((const T*)p + at, next, count - k, n - at, v);
            else
                for (int i = 0; i < S::DEPTH; i++) v[i] = zero();
            for (int i = 0; i < S::DEPTH; i++) store(panel + at + i * W, v[i]);
        }
    }
}

// W rows of sums, turned.
static inline void turned(const float* sums, int ldc, V* r) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) r[i] = load(sums + i * ldc);
    transpose(r);
}

// Outputs and columns of a weight's gradient in one task. The side that is contiguous in memory is longer.
struct Cut {
    int outputs, columns;
    explicit Cut(bool by_left) : outputs(by_left ? 192 : 384), columns(by_left ? 256 : 128) {}
};
constexpr int64_t CUT_FLOATS = 192 * 256;

// to[o][c], or to[c][o], = sum over rows of left[row][o] * right[row][c], for a task's outputs from o0 and columns from c0.
// `to` is where these begin. Its lines are fetched while the sums are made; or (PAST: the caches do not hold what is written)
// they are written whole, without being read, where they can be.
template <class T, bool PAST>
static __attribute__((noinline)) void outer(const Columns<T>& left, const Rows& right, int width, int o0, int c0, char* to, int64_t to_row,
                                            bool by_left, float* panel) {
    const Cut cut(by_left);
    const int no = left.count - o0 < cut.outputs ? left.count - o0 : cut.outputs;
    const int nc = width - c0 < cut.columns ? width - c0 : cut.columns, ldc = cut.columns;
    to += by_left ? o0 * to_row + c0 * (int64_t)sizeof(T) : c0 * to_row + o0 * (int64_t)sizeof(T);
    float* sums = panel + PANEL_BYTES / sizeof(float);
    constexpr int TILE = Columns<T>::TILE;
    const int first = o0 / TILE, last = (o0 + no + TILE - 1) / TILE;
    const int64_t steps = Sweep<T>::steps(last - first, nc, padded<T>(right.count) / W);
    const int length = by_left ? nc : no, count = by_left ? no : nc;  // of a row of `to`, and its rows
    const bool whole = PAST && (((uintptr_t)to | (uintptr_t)to_row | (uintptr_t)(length * sizeof(T))) & 63) == 0;
    Ahead lines = Ahead::over(whole ? nullptr : to, to_row, count, length * (int64_t)sizeof(T), steps);
    Sweep<T> sweep;
    for (int r0 = 0; r0 < right.count; r0 += SLICE<T>) {
        const int some = right.count - r0 < SLICE<T> ? right.count - r0 : SLICE<T>;
        const char* rows[SLICE<T>];
        for (int r = 0; r < some; r++) rows[r] = right.of(r0 + r);
        for (int g = 0; g < nc; g += GROUP) {
            fill_rows<T>(rows, some, (c0 + g) * (int64_t)sizeof(T), nc - g, panel);
            auto of = [&](int t) {
                return Packet<T>{left.tile(t) + (int64_t)r0 / Step<T>::DEPTH * left.size(t), left.size(t), sums + (t * TILE - o0) * ldc + g};
            };
            sweep.over(panel, nc - g < GROUP ? nc - g : GROUP, padded<T>(some) / W, first, last, of, ldc, r0 > 0, lines);
        }
    }
    if (by_left) {
        for (int o = 0; o < no; o++, to += to_row) {
            int c = 0;
            for (const float* at = sums + o * ldc; whole && c < nc; c += 2 * W) stream((T*)to + c, load(at + c), load(at + c + W));
            for (; c + W <= nc; c += W) store_n((T*)to + c, load(sums + o * ldc + c), W);
            if (c < nc) store_n((T*)to + c, load(sums + o * ldc + c), nc - c);
        }
    } else {
        for (int c = 0; c < nc; c += W, to += W * to_row) {
            int o = 0;
            for (V r[2][W]; whole && o < no; o += 2 * W) {
                for (int h = 0; h < 2; h++) turned(sums + (o + h * W) * ldc + c, ldc, r[h]);
                for (int i = 0; i < W && c + i < nc; i++) stream((T*)(to + i * to_row) + o, r[0][i], r[1][i]);
            }
            for (V r[W]; o < no; o += W) {
                turned(sums + o * ldc + c, ldc, r);
#pragma GCC unroll 16
                for (int i = 0; i < W; i++)
                    if (c + i < nc) store_n((T*)(to + i * to_row) + o, r[i], no - o);
            }
        }
    }
    if (PAST) _mm_sfence();
}

}  // namespace moec
