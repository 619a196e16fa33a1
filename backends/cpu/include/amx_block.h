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

constexpr int SLICE_STEPS = 64;  // products along K, after which sums wait: so much of 256 tokens and of two units fits the second cache

// Weights whose rows are outputs.
//
// A unit is 32 rows of weights, 16 of gate and 16 of up where there are both, times all tokens of the segment, 32 by 32 along
// a slice of K, mostly all of it. The rows come from memory while the first tokens pass, and lie in the second cache for the
// others; those of the next unit are fetched meanwhile, a few rows with each pair of token tiles, a line of each at a time.
// More at once take the fill buffers that tile loads wait for. With few tokens the processor's own prefetcher does better.
struct InPlace {
    using Tiles = amx::Tiles;
    static constexpr bool ACROSS = true;
    static constexpr int ROWS = 256;  // most of a segment
    template <int PARTS> static constexpr int BLOCK = 128 / PARTS;
    static constexpr int PAIR = 2 * TILE, LDC = PAIR;               // of turned sums
    static constexpr int64_t STAGED = PAIR * TILE, TURNED = TILE * LDC, SUMS = 4 * TILE_FLOATS;  // floats

    static constexpr int64_t room(int64_t rows) {
        return (int64_t)sizeof(float) * (STAGED + TURNED + 128 * (int64_t)up_to((int)(rows < ROWS ? rows : ROWS), PAIR));
    }

    // Rows of a tile as the right operand: within each run of K, [pairs][tokens]. row(t) is where the t-th begins.
    template <int K, class Row> static void pack(Packed<bf16>* tile, int size, Row&& row) {
        const bf16* rows[TILE];
        for (int t = 0; t < size; t++) rows[t] = row(t);
        for (int k = 0; k < K; k += RUN<bf16>) {
            V v[TILE];
            if (size == TILE && k + RUN<bf16> <= K) {
#pragma GCC unroll 16
                for (int t = 0; t < TILE; t++) v[t] = Step<bf16>::row(rows[t] + k);
            } else {
                for (int t = 0; t < TILE; t++) v[t] = t < size ? Step<bf16>::row_n(rows[t] + k, K - k) : zero();
            }
            put_run((float*)packed_at<bf16>(tile, size, 0, k), v, size);
        }
    }
    // Rows that were packed as a left operand, made a right one.
    static void seal(Packed<bf16>* tile, int size, int from, int count) {
        if (size == 1) return;
        for (int k = from; k < from + count; k += RUN<bf16>) {
            float* run = (float*)packed_at<bf16>(tile, size, 0, k);
            V v[TILE];
            for (int t = 0; t < TILE; t++) v[t] = t < size ? load(run + t * W) : zero();
            put_run(run, v, size);
        }
    }
    // Elements k and k + 1 (even, odd) of a tile's tokens, both of them rounded.
    static void put_pair(Packed<bf16>* tile, int size, int k, V even, V odd) {
        const __m512i pair = _mm512_or_si512(_mm512_castps_si512(odd), _mm512_srli_epi32(_mm512_castps_si512(even), 16));
        store_n((float*)tile + (k / RUN<bf16> * W + k % RUN<bf16> / 2) * size, _mm512_castsi512_ps(pair), size);
    }

    // TURN: done(at, n, first token, tokens, c, ldc) gets c[t * ldc + part * ldc / 2 + i] for outputs at + i of each part.
    // Else: done(at, n, first token, tokens, c) gets the sums as they are, c[row(i, part)][t], see row().
    template <int K, int PARTS, bool TURN, class Done>
    static void block(const Place& w, int64_t row, const Packed<bf16>* x, Tiles tokens, const Place& next, float* room, Done&& done) {
        constexpr int WHOLE = K / RUN<bf16>, LEFT = K % RUN<bf16>, OUTPUTS = PAIR / PARTS;  // outputs: of each part, in a unit
        constexpr int SLICES = WHOLE > SLICE_STEPS ? (WHOLE + SLICE_STEPS - 1) / SLICE_STEPS : 1, STEPS = (WHOLE + SLICES - 1) / SLICES;
        float *staged = room, *turned = room + STAGED, *all = turned + TURNED;
        const int pairs = (tokens.count + 1) / 2;
        Shapes shapes;
        int k = 0;
        do {
            const int steps = WHOLE - k < STEPS ? WHOLE - k : STEPS;
            const bool ends = k + steps == WHOLE;
            float* sums = all;
            for (int n = 0; n < w.n; n += OUTPUTS) {
                const int count = w.n - n < OUTPUTS ? w.n - n : OUTPUTS, na = PARTS == 2 || count > TILE ? 2 : 1;
                Operand a[2];
                for (int i = 0; i < na; i++) {
                    const int at = PARTS == 2 ? n : n + i * TILE;
                    a[i] = {w.at[PARTS == 2 ? i : 0] + at * row + k * 64, row, 64, w.n - at < TILE ? w.n - at : TILE};
                    if (LEFT && ends) stage(a[i].at + steps * 64, row, a[i].size, LEFT, staged + i * TILE_FLOATS);
                }
                const Unit then = tokens.count <= 2     ? Unit{}
                                  : n + OUTPUTS < w.n ? unit<PARTS>(w, n + OUTPUTS, row, k)
                                  : ends                ? unit<PARTS>(next, 0, row, 0)
                                                        : unit<PARTS>(w, 0, row, k + steps);
                for (int first = 0; first < tokens.count; first += 2, sums += SLICES > 1 ? SUMS : 0) {
                    const int nb = tokens.count - first < 2 ? 1 : 2;
                    TwoFetches fetch{then.part(0, first / 2, pairs, row), then.part(1, first / 2, pairs, row)};
                    Operand b[2];
                    for (int j = 0; j < nb; j++) {
                        const int size = tokens.size(first + j);
                        const auto* xs = x + (int64_t)tokens.start(first + j) * PADDED<bf16, K> + (int64_t)k * size * W;
                        b[j] = {(const char*)xs, (int64_t)size * 4, (int64_t)size * 64, size};
                    }
                    const char* last = LEFT && ends ? (const char*)staged : nullptr;
                    if (tokens.count == 1) {  // one stream of rows after the other
                        for (int i = 0; i < na; i++) {
                            const char* end = last ? last + i * TILE_FLOATS * (int)sizeof(float) : nullptr;
                            tiles_of(shapes, a + i, 1, b, 1, steps, end, {sums + i * 2 * TILE_FLOATS, 0, 0, 64}, k > 0, fetch);
                        }
                    } else {
                        tiles_of(shapes, a, na, b, nb, steps, last, {sums, 2 * TILE_FLOATS, TILE_FLOATS, 64}, k > 0, fetch);
                    }
                    for (int j = 0; j < nb && ends; j++) {
                        const float* c = sums + j * TILE_FLOATS;
                        const int t0 = tokens.start(first + j), mt = tokens.size(first + j);
                        if constexpr (TURN) {
                            for (int i = 0; i < na; i++) turn(c + i * 2 * TILE_FLOATS, turned + i * TILE);
                            done(n, count, t0, mt, turned, LDC);
                        } else {
                            done(n, count, t0, mt, c);
                        }
                    }
                }
            }
        } while ((k += STEPS) < WHOLE);
    }
    // Where the sums of a unit's i-th output of a part begin.
    template <int PARTS> static constexpr int row(int i, int part) {
        return PARTS == 2 ? part * 2 * TILE_FLOATS + i * TILE : i / TILE * 2 * TILE_FLOATS + i % TILE * TILE;
    }

private:
    static inline __attribute__((always_inline)) void put_run(float* run, V* v, int size) {
        transpose(v);
        if (size == TILE) {
#pragma GCC unroll 16
            for (int i = 0; i < TILE; i++) store(run + i * W, v[i]);
        } else {
            for (int i = 0; i < TILE; i++) store_n(run + i * size, v[i], size);
        }
    }
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
    // Where a unit's rows begin, and how many there are in each of its two halves.
    struct Unit {
        const char* at[2];
        int rows[2];

        // Those that are fetched while the i-th of so many pairs of token tiles passes: a share of all rows, whose lines are
        // asked for as they lie.
        Fetch part(int half, int i, int pairs, int64_t row) const {
            const int all = rows[0] + rows[1], skip = half ? rows[0] : 0;
            int from = all * i / pairs - skip, stop = all * (i + 1) / pairs - skip;
            from = from < 0 ? 0 : from, stop = stop > rows[half] ? rows[half] : stop;
            return {at[half] + from * row, row, 64, stop - from, 1};
        }
    };
    template <int PARTS> static Unit unit(const Place& w, int n, int64_t row, int k) {
        if (!w.at[0]) return {};
        const int count = w.n - n < PAIR / PARTS ? w.n - n : PAIR / PARTS;
        const int64_t skip = n * row + k * 64;
        return {{w.at[0] + skip, PARTS == 2 ? w.at[1] + skip : nullptr}, {count, PARTS == 2 ? count : 0}};
    }
};

// Tiles of rows times up to two tiles of outputs of a panel, of which n are left: to[row * ldc + output] (+)= that.
template <class Soon>
static inline void over_panel(Shapes& shapes, const Operand* rows, int na, const float* panel, int n, int steps, float* to, int ldc, bool add,
                              Soon& soon) {
    const int nb = n > TILE ? 2 : 1;
    Operand b[2];
    for (int j = 0; j < nb; j++) b[j] = {(const char*)(panel + j * TILE), GROUP * 4, TILE * GROUP * 4, TILE};
    tiles_of(shapes, rows, na, b, nb, steps, nullptr, {to, (int64_t)TILE * ldc, TILE, ldc * 4}, add, soon);
}

// Weights whose rows are elements of K.
struct FromPanel {
    using Tiles = amx::Tiles;
    static constexpr int LDC = 256, ROWS = 256;
    template <int PARTS> static constexpr int BLOCK = LDC / PARTS;

    static constexpr int64_t room(int64_t rows) {
        return PANEL_BYTES + (int64_t)sizeof(float) * LDC * (rows < ROWS ? rows : ROWS);
    }
    static constexpr bool ACROSS = false;
    template <int K, class Row> static void pack(Packed<bf16>* tile, int size, Row&& row) { pack_tile<bf16, K>(tile, size, row); }
    static void seal(Packed<bf16>*, int, int, int) {}  // packed rows are the left operand

    template <int K, int PARTS, bool TURN, class Done>
    static void block(const Place& w, int64_t row, const Packed<bf16>* x, Tiles tokens, const Place& next, float* room, Done&& done) {
        constexpr int LENGTH = SLICE<bf16>, PAIR = 2 * TILE;
        float *panel = room, *sums = room + PANEL_BYTES / sizeof(float);
        const int pairs = (tokens.count + 1) / 2, columns = (w.n + PAIR - 1) / PAIR;
        Shapes shapes;
        for (int part = 0; part < PARTS; part++)
            for (int k = 0; k < K; k += LENGTH) {
                const int count = K - k < LENGTH ? K - k : LENGTH, after = k + LENGTH, steps = (count + RUN<bf16> - 1) / RUN<bf16>;
                const Slice soon = after < K          ? Slice{w.at[part] + after * row, w.n, K - after}
                                   : part + 1 < PARTS ? Slice{w.at[part + 1], w.n, K}
                                                      : Slice{next.at[0], next.n, K};
                const int products = pairs * columns * steps, each = (soon.rows() + products - 1) / products;
                int call = 0;
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
                            Fetch fetch = soon.part(call++ * steps * each, row, each);
                            float* to = sums + tokens.start(first) * LDC + part * (LDC / PARTS) + group + n;
                            over_panel(shapes, a, na, panel + n, width - n, steps, to, LDC, k > 0, fetch);
                        }
                    }
                }
            }
        for (int t = 0; t < tokens.count; t++) done(0, w.n, tokens.start(t), tokens.size(t), sums + tokens.start(t) * LDC, LDC);
    }

private:
    // The slice that is wanted after this one: n outputs of up to `left` elements of K.
    struct Slice {
        const char* at;
        int n, left;

        int rows() const { return !at ? 0 : left < SLICE<bf16> ? left : SLICE<bf16>; }
        // What is fetched in a call: `each` rows with every product, from row k on.
        Fetch part(int k, int64_t row, int each) const {
            if (k >= rows()) return {};
            return {at + k * row, row, each * row, each, (n * (int)sizeof(bf16) + 63) / 64};
        }
    };
};

}  // namespace amx

template <> struct Core<bf16, true> : amx::InPlace {};
template <> struct Core<bf16, false> : amx::FromPanel {};

}  // namespace moec
