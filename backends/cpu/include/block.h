// One task of a GEMM: a block of outputs for the rows of a segment, tile by tile, with what follows fetched ahead.
#pragma once
#include "dot.h"

namespace moec {

constexpr int BLOCK = 64;            // most outputs of a part in one task
constexpr int SEGMENT = 512;         // most rows of an expert in one task
constexpr int L1_ROW_BYTES = 4096;   // of a token's row that a tile reads at a time

// A weight matrix of every expert: `table` holds pointers, or `base` and `expert` say where each begins (bytes).
struct Matrix {
    const char* const* table;
    const char* base;
    int64_t expert;
    int64_t row;  // from one row to the next, bytes

    const char* of(int64_t e) const { return table ? table[e] + (int64_t)base : base + e * expert; }
};

// Where the weights of the next task lie: `parts` ranges of memory.
struct Next {
    const char* at[2];
    int64_t bytes;
};

constexpr int up_to(int a, int b) { return (a + b - 1) / b * b; }

// How K is cut: blocks of equal length, so that a tile's token rows stay in the first cache. Depends on K alone.
template <class T, int K> struct Cut {
    static constexpr int BLOCKS = ((int)(K * sizeof(T)) + L1_ROW_BYTES - 1) / L1_ROW_BYTES;
    static constexpr int LENGTH = BLOCKS <= 1 ? K : up_to((K + BLOCKS - 1) / BLOCKS, 64);
    static constexpr int COUNT = (K + LENGTH - 1) / LENGTH;
    static constexpr int LAST = K - LENGTH * (COUNT - 1);
};

// How the rows of a segment are packed, for the same tiles in both GEMMs: each tile by chunks of K (see dot_tile).
struct Tiles {
    int rows, count;

    explicit Tiles(int m) : rows(m), count((m + TILE_TOKENS - 1) / TILE_TOKENS) {}
    int start(int tile) const { return tile * (rows / count) + (tile < rows % count ? tile : rows % count); }
    int size(int tile) const { return rows / count + (tile < rows % count); }
};
template <class T, int K> constexpr int PADDED = up_to(K, Chunk<T>::STEP);
template <class T> static inline T* packed_at(T* tile, int size, int row, int k) {
    constexpr int STEP = Chunk<T>::STEP;
    return tile + (k / STEP * size + row) * STEP + k % STEP;
}

template <class T, int K>
static inline void dot_step(int block, int m, const T* const* w, const T* x, float* c, int ldc, Ahead ahead) {
    using B = Cut<T, K>;
    x += block * B::LENGTH * m;
    if (block + 1 < B::COUNT) dot_rows<T, B::LENGTH>(m, w, x, c, ldc, block > 0, ahead);
    else dot_rows<T, B::LAST>(m, w, x, c, ldc, block > 0, ahead);
}

// Calls done(first token, tokens, c, ldc) for every tile, with c[t][part * ldc / 2 + n] filled.
// w: where the block's first row of each part lies; x: the segment's packed rows; n: outputs of each part.
template <class T, int K, int PARTS, class Done>
static inline void dot_block(const char* const* w, int64_t row, int n, const T* x, Tiles tiles, const Next& next, Done&& done) {
    using B = Cut<T, K>;
    constexpr int LDC = 2 * BLOCK, STEP_BYTES = Chunk<T>::STEP * sizeof(T);
    alignas(64) float c[TILE_TOKENS * LDC + 2 * W];
    const int groups = (n + TILE_ROWS - 1) / TILE_ROWS, steps = PARTS * groups * B::COUNT;
    const int64_t group_bytes = TILE_ROWS * row, step_bytes = K * sizeof(T) / B::COUNT;
    // Lines per step along K: the weights of this block pass once a tile of tokens, those of the next once in all.
    const int want = (TILE_ROWS * STEP_BYTES / 64 + tiles.count - 1) / tiles.count;
    const int lines = want <= 1 ? 1 : want <= 2 ? 2 : 4;
    const int64_t run = step_bytes / STEP_BYTES * lines * 64;  // bytes fetched ahead by one call
    for (int tile = 0; tile < tiles.count; tile++) {
        const int t0 = tiles.start(tile), mt = tiles.size(tile);
        int64_t ahead_at = (int64_t)tile * steps * run;
        auto one = [&](int part, int g, int block) {
            const T* rows[TILE_ROWS];
            for (int r = 0; r < TILE_ROWS; r++) {
                int at = g * TILE_ROWS + r;
                rows[r] = (const T*)(w[part] + (at < n ? at : n - 1) * row) + block * B::LENGTH;
            }
            Ahead ahead{nullptr, 0};
            if (tiles.count == 1) {
                // Nothing is used twice: the next rows are what is wanted next.
                const char* at = g + 1 < groups ? w[part] + (g + 1) * group_bytes : part + 1 < PARTS ? w[part + 1] : next.at[0];
                if (at) ahead = {at + block * TILE_ROWS * step_bytes, lines};
            } else if (next.at[0] && ahead_at < PARTS * next.bytes) {
                bool second = ahead_at >= next.bytes;
                ahead = {next.at[second] + (ahead_at - (second ? next.bytes : 0)), lines};
            }
            ahead_at += run;
            dot_step<T, K>(block, mt, rows, x + (int64_t)t0 * PADDED<T, K>, c + part * BLOCK + g * TILE_ROWS, LDC, ahead);
        };
        if (tiles.count == 1) {
            for (int part = 0; part < PARTS; part++)
                for (int g = 0; g < groups; g++)
                    for (int block = 0; block < B::COUNT; block++) one(part, g, block);
        } else {
            for (int block = 0; block < B::COUNT; block++)
                for (int part = 0; part < PARTS; part++)
                    for (int g = 0; g < groups; g++) one(part, g, block);
        }
        done(t0, mt, c, LDC);
    }
}

}  // namespace moec
