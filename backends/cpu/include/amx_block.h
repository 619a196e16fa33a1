// GEMM blocks of bf16 on AMX.
//
// Weights whose rows are outputs are the left operand where they lie, without a copy: tiles of 16 of their rows, times
// tokens packed as [K / 2][tokens][2], give the transposed result, which is turned when it is done. Weights whose rows are
// elements of K are brought into a panel as for AVX-512 and are the right operand; tokens are rows of the left one.
#pragma once
#include "amx.h"
#include "block.h"

namespace moec {
namespace amx {

// Sixteen rows to a tile of tokens, the last with fewer.
struct Tiles {
    int rows, count;

    explicit Tiles(int m) : rows(m), count((m + TILE - 1) / TILE) {}
    int start(int tile) const { return tile * TILE; }
    int size(int tile) const { return rows - tile * TILE < TILE ? rows - tile * TILE : TILE; }
};

constexpr int SLICE_STEPS = 16;  // products along K, after which the sums of many tokens wait: 32 tokens of it take 32 KB

// Weights whose rows are outputs.
struct InPlace {
    using Tiles = amx::Tiles;
    static constexpr int LDC = 128, LINES = LDC / TILE;  // outputs of a block, of all matrices together
    template <int PARTS> static constexpr int BLOCK = LDC / PARTS;
    static constexpr int64_t STAGED = LDC * TILE, TURNED = LDC * TILE;  // floats

    static constexpr int64_t room(int64_t rows) {
        return (int64_t)sizeof(float) * (STAGED + TURNED + (int64_t)LDC * up_to((int)(rows < SEGMENT ? rows : SEGMENT), TILE));
    }
    // Packed rows become the right operand: within each run, what was [tokens][pairs] is [pairs][tokens].
    static void seal(Packed<bf16>* tile, int size, int from, int count) {
        if (size == 1) return;
        for (int k = from; k < from + count; k += RUN<bf16>) {
            float* run = (float*)packed_at<bf16>(tile, size, 0, k);
            V v[TILE];
            if (size == TILE) {
#pragma GCC unroll 16
                for (int t = 0; t < TILE; t++) v[t] = load(run + t * W);
                transpose(v);
#pragma GCC unroll 16
                for (int i = 0; i < TILE; i++) store(run + i * W, v[i]);
            } else {
                for (int t = 0; t < TILE; t++) v[t] = t < size ? load(run + t * W) : zero();
                transpose(v);
                for (int i = 0; i < TILE; i++) store_n(run + i * size, v[i], size);
            }
        }
    }

    // Few tokens: the weights pass once, and the rows after those at work are fetched. Many: a slice of 32 tokens stays in
    // the first cache, the block's rows in the second, where those of the next block arrive over the whole of this one.
    template <int K, int PARTS, class Done>
    static void block(const Place& w, int64_t row, const Packed<bf16>* x, Tiles tokens, const Place& next, float* room, Done&& done) {
        constexpr int WHOLE = K / RUN<bf16>, LEFT = K % RUN<bf16>, BYTES = K * (int)sizeof(bf16), PAIR = 2 * TILE;
        float *staged = room, *turned = room + STAGED, *sums = turned + TURNED;
        const bool once = tokens.count <= 2;
        const int length = once || WHOLE == 0 ? WHOLE : SLICE_STEPS, pairs = (tokens.count + 1) / 2, blocks = (w.n + PAIR - 1) / PAIR;
        if (LEFT)
            for (int part = 0; part < PARTS; part++)
                stage(w.at[part] + WHOLE * RUN<bf16> * sizeof(bf16), row, w.n, LEFT, staged + part * (LDC / PARTS) * TILE);
        Fetch fetch[2];
        for (int part = 0; part < PARTS && !once; part++)
            fetch[part] = Fetch::rows(next.at[part], row, next.n, BYTES, (int64_t)pairs * blocks * (WHOLE + 1));
        Shapes shapes;
        int k = 0;
        do {
            const int steps = WHOLE - k < length ? WHOLE - k : length;
            const bool ends = k + steps == WHOLE && LEFT;
            for (int pair = 0; pair < pairs; pair++) {
                const int first = 2 * pair, nb = tokens.count - first < 2 ? 1 : 2;
                Operand b[2];
                for (int j = 0; j < nb; j++) {
                    const int size = tokens.size(first + j);
                    const auto* xs = x + (int64_t)tokens.start(first + j) * PADDED<bf16, K> + (int64_t)k * size * W;
                    b[j] = {(const char*)xs, (int64_t)size * 4, (int64_t)size * 64, size};
                }
                for (int part = 0; part < PARTS; part++)
                    for (int n = 0; n < w.n; n += PAIR) {
                        const int na = w.n - n > TILE ? 2 : 1, line = part * (LINES / PARTS) + n / TILE;
                        Operand a[2];
                        for (int i = 0; i < na; i++) {
                            const int at = n + i * TILE;
                            a[i] = {w.at[part] + at * row + (int64_t)k * 64, row, 64, w.n - at < TILE ? w.n - at : TILE};
                        }
                        if (once) fetch[part] = after(w, part, n + PAIR, PARTS, row, next, BYTES, steps + 1);
                        const char* last = ends ? (const char*)(staged + line * TILE_FLOATS) : nullptr;
                        float* to = sums + ((int64_t)first * LINES + line) * TILE_FLOATS;
                        tiles_of<true>(shapes, a, na, b, nb, steps, last, {to, TILE_FLOATS, LINES * TILE_FLOATS, 64}, k > 0, fetch[part]);
                    }
            }
            k += length;
        } while (k < WHOLE);
        for (int t = 0; t < tokens.count; t++) {
            for (int part = 0; part < PARTS; part++)
                for (int n = part * (LDC / PARTS), end = n + w.n; n < end; n += TILE)
                    turn(sums + ((int64_t)t * LINES + n / TILE) * TILE_FLOATS, turned + n);
            done(tokens.start(t), tokens.size(t), turned, LDC);
        }
    }

private:
    // The last elements of n rows with zeros after them, as left tiles: what comes after a row is not read.
    static void stage(const char* w, int64_t row, int n, int left, float* to) {
        for (int i = 0; i < n; i++) store(to + i * TILE, Step<bf16>::row_n((const bf16*)(w + i * row), left));
    }
    // A tile [outputs][tokens] as [tokens][outputs].
    static void turn(const float* from, float* to) {
        V v[TILE];
#pragma GCC unroll 16
        for (int i = 0; i < TILE; i++) v[i] = load(from + i * TILE);
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < TILE; i++) store(to + i * LDC, v[i]);
    }
    // The 32 rows from row n on, of this matrix, of the one after it or of the next block.
    static Fetch after(const Place& w, int part, int n, int parts, int64_t row, const Place& next, int64_t bytes, int64_t steps) {
        const Place* place = &w;
        if (n >= w.n) {
            n = 0;
            if (++part == parts) {
                part = 0;
                place = &next;
            }
        }
        if (!place->at[part]) return {};
        const int count = place->n - n < 2 * TILE ? place->n - n : 2 * TILE;
        return Fetch::rows(place->at[part] + n * row, row, count, bytes, steps);
    }
};

// Weights whose rows are elements of K.
struct FromPanel {
    using Tiles = amx::Tiles;
    static constexpr int LDC = 256;
    template <int PARTS> static constexpr int BLOCK = LDC / PARTS;

    static constexpr int64_t room(int64_t rows) {
        return PANEL_BYTES + (int64_t)sizeof(float) * LDC * (rows < SEGMENT ? rows : SEGMENT);
    }
    static void seal(Packed<bf16>*, int, int, int) {}  // packed rows are the left operand

    template <int K, int PARTS, class Done>
    static void block(const Place& w, int64_t row, const Packed<bf16>* x, Tiles tokens, const Place& next, float* room, Done&& done) {
        constexpr int LENGTH = SLICE<bf16>, FIRST = K < LENGTH ? K : LENGTH, PAIR = 2 * TILE;
        float *panel = room, *sums = room + PANEL_BYTES / sizeof(float);
        const int pairs = (tokens.count + 1) / 2, columns = (w.n + PAIR - 1) / PAIR;
        Shapes shapes;
        for (int part = 0; part < PARTS; part++)
            for (int k = 0; k < K; k += LENGTH) {
                const int count = K - k < LENGTH ? K - k : LENGTH, after = k + LENGTH, steps = (count + RUN<bf16> - 1) / RUN<bf16>;
                auto runs = [&](const char* at, int n, int rows) {
                    return Fetch::runs(at, row, rows, n * (int64_t)sizeof(bf16), (int64_t)pairs * columns * steps);
                };
                Fetch fetch = after < K          ? runs(w.at[part] + after * row, w.n, K - after < LENGTH ? K - after : LENGTH)
                              : part + 1 < PARTS ? runs(w.at[part + 1], w.n, FIRST)
                                                 : runs(next.at[0], next.n, FIRST);
                for (int group = 0; group < w.n; group += GROUP) {
                    const int width = w.n - group < GROUP ? w.n - group : GROUP;
                    fill_panel<bf16, false>(w.at[part] + k * row + group * sizeof(bf16), row, width, count, panel);
                    for (int first = 0; first < tokens.count; first += 2) {
                        const int na = tokens.count - first < 2 ? 1 : 2;
                        Operand a[2];
                        for (int i = 0; i < na; i++) {
                            const int size = tokens.size(first + i);
                            const auto* xs = x + (int64_t)tokens.start(first + i) * PADDED<bf16, K> + (int64_t)k / 2 * size;
                            a[i] = {(const char*)xs, 64, (int64_t)size * 64, size};
                        }
                        for (int n = 0; n < width; n += PAIR) {
                            const int nb = width - n > TILE ? 2 : 1;
                            Operand b[2];
                            for (int j = 0; j < nb; j++) b[j] = {(const char*)(panel + n + j * TILE), GROUP * 4, TILE * GROUP * 4, TILE};
                            float* to = sums + tokens.start(first) * LDC + part * (LDC / PARTS) + group + n;
                            tiles_of<false>(shapes, a, na, b, nb, steps, nullptr, {to, TILE * LDC, TILE, LDC * 4}, k > 0, fetch);
                        }
                    }
                }
            }
        for (int t = 0; t < tokens.count; t++) done(tokens.start(t), tokens.size(t), sums + tokens.start(t) * LDC, LDC);
    }
};

}  // namespace amx

template <> struct Core<bf16, true> : amx::InPlace {};
template <> struct Core<bf16, false> : amx::FromPanel {};

}  // namespace moec
