// The layer: slots sorted by expert; then, in one parallel region with three barriers, their rows packed, up GEMM and
// activation, down GEMM, weighting and combine. An activation of whole rows waits for them at a fourth barrier; a function
// of rows after the down GEMM is part of the combine.
#pragma once
#include <omp.h>

#include <type_traits>

#include "block.h"
#include "math.h"
#include "rows.h"
#include "segments.h"
#if defined(__AMX_BF16__) || defined(MOEC_EMULATE_AMX)
#include "amx_block.h"
#endif

namespace moec {

// What Python passes: 64-bit fields alone, in this order.
struct Call {
    const char* x;
    int64_t x_row;  // bytes
    const int64_t* ids;
    const char* weights;
    char* out;
    int64_t tokens, top_k, threads;
    int64_t room_bytes;    // of each thread; see room_of
    char *a, *o, *room;    // packed [R, I] activations; [T*k, N] outputs, before them packed [R, K] rows; see room()
    int32_t* ints;         // E + 1 offsets, R slots by expert
    Matrix up[2], down;    // gate and up, or one
    Matrix up_bias[2], down_bias;  // `row`: from one element to the next
    const void* const* captures;
    const void* const* post_captures;
    const int64_t* inner;                // widths of the activations, where experts differ in them
    const int64_t *up_rows, *down_rows;  // `row` of every expert's matrices, where they differ in it
};

template <class B> static inline void bias_block(float* to, const Matrix& m, int64_t expert, int from, int n) {
    const char* at = m.of(expert);
    for (int i = 0; i < n; i++) {
        store_n(to + i, broadcast((const B*)(at + (from + i) * m.row)), 1);
    }
}

static constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The GEMM of experts that differ in their widths: blocks of the same form, with as much of K as `Place` says.
template <class T, bool NK> struct RaggedCore {
    using Tiles = moec::Tiles;
    template <int PARTS> static constexpr int BLOCK = moec::BLOCK<NK, PARTS>;
    static constexpr int64_t room(int64_t rows) { return room_of<NK>(rows); }
    static constexpr int ROWS = SEGMENT;
    static constexpr bool ACROSS = false;
    template <int K, class Row> static void pack(Packed<T>* tile, int size, Row&& row) { pack_tile<T, K>(tile, size, row); }
    static void seal(Packed<T>*, int, int, int) {}
    template <int K, int PARTS, bool TURN, class Done>
    static void block(const Place& w, int64_t row, const Packed<T>* x, Tiles tiles, const Place& next, float* room, Done&& done) {
        gemm_block<T, NK, K, PARTS>(w, row, x, tiles, next, room, done, w.k);
    }
};

template <class L> struct Layer {
    using T = typename L::T;
    using UpCore = std::conditional_t<L::RAGGED, RaggedCore<T, L::UP_NK>, Core<T, L::UP_NK>>;
    using DownCore = std::conditional_t<L::RAGGED, RaggedCore<T, L::DOWN_NK>, Core<T, L::DOWN_NK>>;
    using Tiles = typename UpCore::Tiles;
    // Gate and up are two matrices, or one whose outputs come in pairs, or there is one projection.
    static constexpr int MATRICES = L::PAIRED ? 1 : L::PARTS, OUTPUTS = L::PAIRED ? 2 : 1;
    static constexpr int UP = UpCore::template BLOCK<MATRICES> / OUTPUTS, DOWN = DownCore::template BLOCK<1>;
    static constexpr int UP_BLOCKS = (L::M + UP - 1) / UP, DOWN_BLOCKS = (L::N + DOWN - 1) / DOWN;
    static constexpr int K_PADDED = PADDED<T, L::K>, I_PADDED = PADDED<T, L::I>;

    static constexpr int SEGMENT_ROWS = UpCore::ROWS < DownCore::ROWS ? UpCore::ROWS : DownCore::ROWS;
    // Activations go from the up GEMM's sums into the down GEMM's rows as they lie.
    static constexpr bool ACROSS = UpCore::ACROSS && DownCore::ACROSS && L::LANEWISE && !L::ROWS;
    static constexpr int SHARES = 8;  // of a segment, where rows are worked on one by one

    // Bytes of working memory: of a slot in `a` and in `o`, and of a thread's room for so many rows.
    static constexpr int64_t A_PACKED = sizeof(Packed<T>) * I_PADDED, A_ROW = A_PACKED + (L::ROWS ? sizeof(T) * L::M : 0);
    static constexpr int64_t SLOT = up_to(larger(sizeof(T) * L::N, L::POST ? sizeof(typename L::Row) * L::WIDTH : 0), sizeof(float));
    static constexpr int64_t O_ROW = larger(sizeof(Packed<T>) * K_PADDED, SLOT);
    static constexpr int64_t room_bytes(int64_t rows) {
        return larger(larger(UpCore::room(rows), DownCore::room(rows)), sizeof(float) * L::ROW_FLOATS);
    }

    const Call& c;
    const int32_t* order;
    Segments segments;

    // Of an expert: the width of its activations, and from one row of its weights to the next.
    int inner(int expert) const { return L::RAGGED ? (int)c.inner[expert] : L::I; }
    int outputs(int expert) const { return L::ROWS ? L::M : inner(expert); }
    int64_t up_row(int expert) const { return c.up_rows ? c.up_rows[expert] : c.up[0].row; }
    int64_t down_row(int expert) const { return c.down_rows ? c.down_rows[expert] : c.down.row; }

    // The block of a task; of experts narrower than the widest, the last have no outputs.
    static int part_of(int all, int from, int most) { return all - from < most ? all - from : most; }
    Place up_at(Segment s, int block) const {
        const int i0 = block * UP, n = part_of(outputs(s.expert), i0, UP);
        Place at{{nullptr, nullptr}, n * OUTPUTS, L::K};
        for (int p = 0; p < MATRICES && n > 0; p++)
            at.at[p] = c.up[p].of(s.expert) + (int64_t)i0 * OUTPUTS * (L::UP_NK ? up_row(s.expert) : (int64_t)sizeof(T));
        return at;
    }
    Place down_at(Segment s, int block) const {
        const int n0 = block * DOWN, n = part_of(L::N, n0, DOWN);
        const char* at = c.down.of(s.expert) + (int64_t)n0 * (L::DOWN_NK ? down_row(s.expert) : (int64_t)sizeof(T));
        return {{at, nullptr}, n, inner(s.expert)};
    }

    Packed<T>* packed_x(const Segment& s) const { return (Packed<T>*)c.o + (int64_t)s.start * K_PADDED; }
    Packed<T>* packed_a(const Segment& s) const { return (Packed<T>*)c.a + (int64_t)s.start * I_PADDED; }
    T* h_row(int row) const { return (T*)(c.a + c.tokens * c.top_k * A_PACKED) + (int64_t)row * L::M; }
    char* o_row(int64_t slot) const { return c.o + slot * SLOT; }
    float* room() const { return (float*)(c.room + omp_get_thread_num() * c.room_bytes); }

    // The token rows of a segment, tile by tile.
    void pack(Segment s) const {
        const Tiles tiles(s.rows);
        for (int tile = 0; tile < tiles.count; tile++) {
            const int t0 = tiles.start(tile);
            auto row = [&](int t) { return (const T*)(c.x + order[s.start + t0 + t] / c.top_k * c.x_row); };
            UpCore::template pack<L::K>(packed_x(s) + (int64_t)t0 * K_PADDED, tiles.size(tile), row);
        }
    }

    // The activations of columns i0 .. i0 + n - 1 of a tile, and after the last column zeros up to a whole run.
    void activate(const Segment& s, int i0, int n, int t0, int mt, const float* h, int ldh, const float (*bias)[UP + W], int at) const {
        const int all = inner(s.expert), stop = i0 + n < all ? n : up_to(all, RUN<T>) - i0;
        Packed<T>* tile = packed_a(s) + (int64_t)t0 * I_PADDED;
        for (int t = 0; t < mt; t++) {
            for (int i = 0; i < stop; i += W) {
                V a = zero();
                if (i < n) {
                    V g, u;
                    if constexpr (L::PAIRED) {
                        load_pairs(h + t * ldh + 2 * i, g, u);
                    } else {
                        g = load(h + t * ldh + i);
                        u = load(h + t * ldh + (L::PARTS - 1) * ldh / 2 + i);
                    }
                    g = round_to<T>(g);
                    u = round_to<T>(u);
                    if (L::UP_BIAS) {
                        g = round_to<T>(g + load(bias[0] + at + i));
                        u = round_to<T>(u + load(bias[L::PARTS - 1] + at + i));
                    }
                    a = keep_n(L::activation(g, u, c.captures, i0 + i, n - i), n - i);
                }
                Step<T>::put(packed_at<T>(tile, mt, t, i0 + i), a);
            }
        }
        DownCore::seal(tile, mt, i0, stop);
    }

    // The same from sums that lie [outputs][tokens], as activations are packed there: nothing is turned. at: the unit's
    // first output within the block.
    void activate_across(const Segment& s, int i0, int n, int at, int t0, int mt, const float* h, const float (*bias)[UP + W]) const {
        const int all = inner(s.expert), stop = i0 + n < all ? n : up_to(all, RUN<T>) - i0;
        Packed<T>* tile = packed_a(s) + (int64_t)t0 * I_PADDED;
        auto activation = [&](int i) {
            if (i >= n) return zero();
            auto sum = [&](int part) {
                const int row = L::PAIRED ? UpCore::template row<1>(2 * i + part, 0) : UpCore::template row<MATRICES>(i, part);
                V v = round_to<T>(load(h + row));
                return L::UP_BIAS ? round_to<T>(v + set1(bias[part][at + i])) : v;
            };
            return L::activation(sum(0), sum(L::PARTS - 1), c.captures, 0, 0);
        };
        for (int i = 0; i < stop; i += 2) UpCore::put_pair(tile, mt, i0 + i, activation(i), activation(i + 1));
    }

    // A row of a GEMM's sums, rounded, with its bias.
    template <bool BIAS> static void put_row(const float* sums, const float* bias, T* to, int n) {
        for (int i = 0; i < n; i += W) {
            V v = load(sums + i);
            if (BIAS) v = round_to<T>(v) + load(bias + i);
            store_n(to + i, v, n - i);
        }
    }

    void up(Segment s, int block, const Place& next) const {
        const int i0 = block * UP, n = part_of(outputs(s.expert), i0, UP);
        if (n <= 0) return;
        alignas(64) float bias[2][UP + W];
        if (L::UP_BIAS)
            for (int p = 0; p < L::PARTS; p++) bias_block<T>(bias[p], c.up_bias[p], s.expert, i0, n);
        const Place w = up_at(s, block);
        if constexpr (ACROSS) {
            auto done = [&](int at, int count, int t0, int mt, const float* h) {
                activate_across(s, i0 + at / OUTPUTS, count / OUTPUTS, at / OUTPUTS, t0, mt, h, bias);
            };
            UpCore::template block<L::K, MATRICES, false>(w, up_row(s.expert), packed_x(s), Tiles(s.rows), next, room(), done);
        } else {
            auto done = [&](int at, int count, int t0, int mt, const float* h, int ldh) {
                if constexpr (L::ROWS) {
                    for (int t = 0; t < mt; t++) put_row<L::UP_BIAS>(h + t * ldh, bias[0] + at, h_row(s.start + t0 + t) + i0 + at, count);
                } else {
                    activate(s, i0 + at / OUTPUTS, count / OUTPUTS, t0, mt, h, ldh, bias, at / OUTPUTS);
                }
            };
            UpCore::template block<L::K, MATRICES, true>(w, up_row(s.expert), packed_x(s), Tiles(s.rows), next, room(), done);
        }
    }

    void down(Segment s, int block, const Place& next) const {
        const int n0 = block * DOWN, n = part_of(L::N, n0, DOWN);
        alignas(64) float bias[DOWN + W];
        if (L::DOWN_BIAS) bias_block<T>(bias, c.down_bias, s.expert, n0, n);
        auto done = [&](int at, int count, int t0, int mt, const float* h, int ldh) {
            for (int t = 0; t < mt; t++)
                put_row<L::DOWN_BIAS>(h + t * ldh, bias + at, (T*)o_row(order[s.start + t0 + t]) + n0 + at, count);
        };
        DownCore::template block<L::I, 1, true>(down_at(s, block), down_row(s.expert), packed_a(s), Tiles(s.rows), next, room(), done);
    }

    // A share of a segment's tiles: the activation of their rows.
    void rows(Segment s, int share) const {
        if constexpr (L::ROWS) {
            const Tiles tiles(s.rows);
            float *h = room(), *rest = h + padded_row(L::M);
            for (int tile = tiles.count * share / SHARES; tile < tiles.count * (share + 1) / SHARES; tile++) {
                const int t0 = tiles.start(tile), mt = tiles.size(tile);
                Packed<T>* to = packed_a(s) + (int64_t)t0 * I_PADDED;
                for (int t = 0; t < mt; t++) {
                    auto put = [&](int i, V a) { Step<T>::put(packed_at<T>(to, mt, t, i), keep_n(a, L::I - i)); };
                    widen_row<L::M>(h_row(s.start + t0 + t), h);
                    L::activation_row(h, c.captures, rest, put);
                    for (int i = up_to(L::I, W); i < up_to(L::I, RUN<T>); i += W) put(i, zero());
                }
                DownCore::seal(to, mt, 0, up_to(L::I, RUN<T>));
            }
        }
    }

    // The function of a slot's row after the down GEMM, in place.
    void post(int64_t slot) const {
        float* o = room();
        auto* to = (typename L::Row*)o_row(slot);
        widen_row<L::N>((const T*)o_row(slot), o);
        L::post_row(o, c.post_captures, o + padded_row(L::N), [&](int i, V v) { store_n(to + i, v, L::WIDTH - i); });
    }

    // A token's rows times their weights, each product rounded, added in the order of k.
    void combine(int64_t token) const {
        using R = typename L::Product;
        const int64_t first = token * c.top_k;
        auto live = [&](int64_t s) { return c.ids[s] >= 0 && c.ids[s] < L::E; };
        if constexpr (L::POST)
            for (int64_t s = first; s < first + c.top_k; s++)
                if (live(s)) post(s);
        auto* out = (typename L::Out*)c.out + token * L::WIDTH;
        for (int n = 0; n < L::WIDTH; n += W) {
            V sum = zero();
            for (int64_t s = first; s < first + c.top_k; s++) {
                if (!live(s)) continue;
                V weight = broadcast((const typename L::Weight*)c.weights + s);
                sum = sum + round_to<R>(load_n((const typename L::Row*)o_row(s) + n, L::WIDTH - n) * weight);
            }
            store_n(out + n, round_to<R>(sum), L::WIDTH - n);
        }
    }

    void run() const {
        std::atomic<int> pack_tasks{0}, up_tasks{0}, row_tasks{0}, down_tasks{0};
#pragma omp parallel num_threads((int)c.threads)
        {
            Segments::Cursor here, there;
            share(pack_tasks, segments.count, [&](int task, int) { pack(segments.at(task, here)); });
#pragma omp barrier
            here = {};
            share(up_tasks, segments.count * UP_BLOCKS, [&](int task, int after) {
                Place next{{nullptr, nullptr}, 0};
                if (after >= 0) next = up_at(segments.at(after / UP_BLOCKS, there), after % UP_BLOCKS);
                up(segments.at(task / UP_BLOCKS, here), task % UP_BLOCKS, next);
            });
#pragma omp barrier
            if constexpr (L::ROWS) {
                here = {};
                share(row_tasks, segments.count * SHARES, [&](int task, int) { rows(segments.at(task / SHARES, here), task % SHARES); });
#pragma omp barrier
            }
            here = there = {};
            share(down_tasks, segments.count * DOWN_BLOCKS, [&](int task, int after) {
                Place next{{nullptr, nullptr}, 0};
                if (after >= 0) next = down_at(segments.at(after / DOWN_BLOCKS, there), after % DOWN_BLOCKS);
                down(segments.at(task / DOWN_BLOCKS, here), task % DOWN_BLOCKS, next);
            });
#pragma omp barrier
            const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
            for (int64_t t = c.tokens * i / n; t < c.tokens * (i + 1) / n; t++) combine(t);
        }
    }
};

template <class L> static void experts(const Call& c) {
    int32_t *offsets = c.ints, *order = c.ints + L::E + 1;
    sort_slots(c.ids, c.tokens * c.top_k, L::E, offsets, order);
    Layer<L>{c, order, Segments(offsets, L::E, Layer<L>::SEGMENT_ROWS)}.run();
}

}  // namespace moec
