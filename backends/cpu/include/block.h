// One task of a GEMM: a block of outputs for the rows of a segment.
#pragma once
#include "direct.h"

namespace moec {

constexpr int SEGMENT = 512;  // most rows of an expert in one task

// A weight matrix of every expert: `table` holds pointers, or `base` and `expert` say where each begins (bytes).
struct Matrix {
    const char* const* table;
    const char* base;
    int64_t expert;
    int64_t row;  // from one row to the next, bytes

    const char* of(int64_t e) const { return table ? table[e] + (int64_t)base : base + e * expert; }
};

// Where the weights of a block begin in each matrix, and how many outputs of each it has.
struct Place {
    const char* at[2];
    int n;
    int k = 0;  // elements of K, where experts differ in them
};

constexpr int up_to(int a, int b) { return (a + b - 1) / b * b; }

// How the rows of a segment are packed, for the same tiles in both GEMMs: each tile by runs of K, [run][rows][W] steps.
struct Tiles {
    int rows, count;

    explicit Tiles(int m) : rows(m), count((m + TILE_TOKENS - 1) / TILE_TOKENS) {}
    int start(int tile) const { return tile * (rows / count) + (tile < rows % count ? tile : rows % count); }
    int size(int tile) const { return rows / count + (tile < rows % count); }
};
template <class T> using Packed = typename Step<T>::X;
// Steps of a packed row of K elements, and where element k (the first of a step) of a tile's row lies.
template <class T, int K> constexpr int PADDED = up_to(K, RUN<T>) / Step<T>::DEPTH;
template <class T> static inline Packed<T>* packed_at(Packed<T>* tile, int size, int row, int k) {
    constexpr int DEPTH = Step<T>::DEPTH;
    return tile + (k / RUN<T> * size + row) * W + k % RUN<T> / DEPTH;
}
template <class T, int K> static inline void pack_row(Packed<T>* tile, int size, int row, const T* from) {
    for (int k = 0; k < K; k += RUN<T>) {
        V v = k + RUN<T> <= K ? Step<T>::row(from + k) : Step<T>::row_n(from + k, K - k);
        store((float*)packed_at<T>(tile, size, row, k), v);
    }
}

template <class T, int K, class Row> static inline void pack_tile(Packed<T>* tile, int size, Row&& row) {
    for (int t = 0; t < size; t++) pack_row<T, K>(tile, size, t, row(t));
}

// Outputs of a block that lie in one matrix and of a panel. Rows that are outputs are read in long runs whatever the
// block; rows that are elements of K are not, so blocks are wider there.
template <bool NK> constexpr int COLUMNS = NK ? 128 : 256;           // of all matrices together
template <bool NK, int PARTS> constexpr int BLOCK = NK ? 64 : 256 / PARTS;  // of one
constexpr int64_t PANEL_BYTES = sizeof(float) * STEPS * GROUP;

// A thread's room: a panel, and the sums of a segment's rows.
template <bool NK> constexpr int64_t room_of(int64_t rows) {
    return PANEL_BYTES + (int64_t)sizeof(float) * COLUMNS<NK> * (rows < SEGMENT ? rows : SEGMENT);
}

// gemm_block for a few tokens.
template <class T, int K, int PARTS, class Done>
static inline void few_block(const Place& w, int64_t row, const Packed<T>* x, Tiles tiles, const Place& next, float* sums, Done&& done,
                             int k) {
    constexpr int LDC = COLUMNS<true>;
    const auto* second = tiles.count > 1 ? x + (int64_t)tiles.start(1) * PADDED<T, K> : x;
    for (int part = 0; part < PARTS; part++)
        for (int at = 0; at < w.n; at += W) {
            const char *rows = w.at[part] + at * row, *then = at + W < w.n ? rows + W * row : part + 1 < PARTS ? w.at[part + 1] : next.at[0];
            direct_of<T>(tiles.rows, rows, row, w.n - at < W ? w.n - at : W, then ? then : rows, x, second, k,
                         sums + part * (LDC / 2) + at, LDC);
        }
    for (int t = 0; t < tiles.count; t++) done(0, w.n, tiles.start(t), tiles.size(t), sums + tiles.start(t) * LDC, LDC);
}

// Calls done(0, outputs, first token, tokens, c, ldc) for every tile, with c[t * ldc + part * ldc / 2 + n] filled.
// x: the segment's packed rows. next: the block that this thread takes after this one. k: how much of K there is.
template <class T, bool NK, int K, int PARTS, class Done>
static inline void gemm_block(const Place& w, int64_t row, const Packed<T>* x, Tiles tiles, const Place& next, float* room, Done&& done,
                              int k = K) {
    constexpr int LDC = COLUMNS<NK>, LENGTH = SLICE<T>;
    if constexpr (NK)
        if (tiles.rows <= DIRECT_TOKENS) return few_block<T, K, PARTS>(w, row, x, tiles, next, room, done, k);
    const int first = k < LENGTH ? k : LENGTH;
    float *panel = room, *sums = room + PANEL_BYTES / sizeof(float);
    const int groups = (w.n + GROUP - 1) / GROUP;
    auto ahead = [&](const char* at, int n, int length) {
        const int64_t steps = (int64_t)groups * tiles.count * (up_to(length, RUN<T>) / Step<T>::DEPTH);
        return NK ? Ahead::over(at, row, n, length * sizeof(T), steps) : Ahead::over(at, row, length, n * sizeof(T), steps);
    };
    for (int part = 0; part < PARTS; part++)
        for (int k0 = 0; k0 < k; k0 += LENGTH) {
            const int length = k - k0 < LENGTH ? k - k0 : LENGTH, after = k0 + LENGTH;
            auto slice = [&](int from) { return w.at[part] + (NK ? from * (int64_t)sizeof(T) : from * row); };
            Ahead soon = after < k          ? ahead(slice(after), w.n, k - after < LENGTH ? k - after : LENGTH)
                         : part + 1 < PARTS ? ahead(w.at[part + 1], w.n, first)
                                            : ahead(next.at[0], next.n, first);
            for (int g = 0; g < groups; g++) {
                const int64_t from = g * GROUP * (NK ? row : (int64_t)sizeof(T));
                fill_panel<T, NK>(slice(k0) + from, row, w.n - g * GROUP < GROUP ? w.n - g * GROUP : GROUP, length, panel);
                for (int t = 0; t < tiles.count; t++) {
                    const int t0 = tiles.start(t), mt = tiles.size(t);
                    const auto* xs = x + (int64_t)t0 * PADDED<T, K> + (int64_t)k0 / Step<T>::DEPTH * mt;
                    tile_of<T, NK>(mt, panel, xs, up_to(length, RUN<T>) / RUN<T>,
                                   sums + t0 * LDC + part * (LDC / 2) + g * GROUP, LDC, k0 > 0, soon);
                }
            }
        }
    for (int t = 0; t < tiles.count; t++) done(0, w.n, tiles.start(t), tiles.size(t), sums + tiles.start(t) * LDC, LDC);
}

// The GEMM of a layer's weights of one form. There are others for bf16 on AMX.
template <class T, bool NK> struct Core {
    using Tiles = moec::Tiles;
    template <int PARTS> static constexpr int BLOCK = moec::BLOCK<NK, PARTS>;  // outputs of each matrix
    static constexpr int64_t room(int64_t rows) { return room_of<NK>(rows); }
    static constexpr int ROWS = SEGMENT;   // most of a segment
    static constexpr bool ACROSS = false;  // sums may be had [outputs][tokens], and rows are packed so
    // The rows of a tile; row(t) is where the t-th begins.
    template <int K, class Row> static void pack(Packed<T>* tile, int size, Row&& row) { pack_tile<T, K>(tile, size, row); }
    // `count` elements of a tile's packed rows, from `from` on, are there; both are whole runs.
    static void seal(Packed<T>*, int, int, int) {}
    // TURN: what is done with the sums takes them [tokens][outputs], as it always may.
    template <int K, int PARTS, bool TURN, class Done>
    static void block(const Place& w, int64_t row, const Packed<T>* x, Tiles tiles, const Place& next, float* room, Done&& done) {
        gemm_block<T, NK, K, PARTS>(w, row, x, tiles, next, room, done);
    }
};

}  // namespace moec
