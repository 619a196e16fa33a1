// The layer: slots sorted by expert; then, in one parallel region with three barriers, their rows packed, up GEMM and
// activation, down GEMM, weighting and combine.
#pragma once
#include <omp.h>

#include <atomic>

#include "block.h"
#include "math.h"
#include "outer.h"

namespace moec {

// What Python passes: 64-bit fields alone, in this order.
struct Call {
    const char* x;
    int64_t x_row;  // bytes
    const int64_t* ids;
    const char* weights;
    char* out;
    int64_t tokens, top_k, threads;
    char *a, *o, *wide;    // packed [R, I] activations; [T*k, N] outputs, before them packed [R, K] rows; see wide()
    int32_t* ints;         // E + 1 offsets, R slots by expert
    Matrix up[2], down;    // gate and up, or one
    Matrix up_bias[2], down_bias;  // `row`: from one element to the next
    const void* const* captures;
};

struct Segment {
    int expert, start, rows;
};

// Slots in the order of their experts, stable; slots of no expert are left out. Returns how many there are.
static inline int sort_slots(const Call& c, int experts, int32_t* offsets, int32_t* order) {
    const int64_t total = c.tokens * c.top_k;
    for (int e = 0; e <= experts; e++) offsets[e] = 0;
    for (int64_t s = 0; s < total; s++)
        if (c.ids[s] >= 0 && c.ids[s] < experts) offsets[c.ids[s] + 1]++;
    for (int e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
    for (int64_t s = 0; s < total; s++)
        if (c.ids[s] >= 0 && c.ids[s] < experts) order[offsets[c.ids[s]]++] = (int32_t)s;
    for (int e = experts; e > 0; e--) offsets[e] = offsets[e - 1];
    offsets[0] = 0;
    return offsets[experts];
}

// The rows of the i-th task's expert: experts with many rows have several segments.
struct Segments {
    const int32_t* offsets;
    int experts, count;

    Segments(const int32_t* o, int e) : offsets(o), experts(e), count(0) {
        for (int i = 0; i < e; i++) count += pieces(i);
    }
    int pieces(int e) const { return (offsets[e + 1] - offsets[e] + SEGMENT - 1) / SEGMENT; }

    // A cursor only moves forward: tasks are taken in order.
    struct Cursor {
        int expert = 0, before = 0;
    };
    Segment at(int i, Cursor& k) const {
        while (i >= k.before + pieces(k.expert)) k.before += pieces(k.expert++);
        int rows = offsets[k.expert + 1] - offsets[k.expert], n = pieces(k.expert), j = i - k.before;
        int start = (int)((int64_t)rows * j / n), stop = (int)((int64_t)rows * (j + 1) / n);
        return {k.expert, offsets[k.expert] + start, stop - start};
    }
};

// Outputs of a part in one task: as many as keep its weights within a quarter of a usual second cache.
constexpr int outputs_of(int64_t row_bytes, int outputs) {
    int64_t n = 262144 / row_bytes / 16 * 16;
    int fit = n < 16 ? 16 : n > BLOCK ? BLOCK : (int)n;
    return fit < outputs ? fit : outputs;
}

template <class B> static inline void bias_block(float* to, const Matrix& m, int64_t expert, int from, int n) {
    const char* at = m.of(expert);
    for (int i = 0; i < n; i++) {
        store_n(to + i, broadcast((const B*)(at + (from + i) * m.row)), 1);
    }
}

template <class L> struct Layer {
    using T = typename L::T;
    static constexpr int UP = outputs_of(L::PARTS * L::K * sizeof(T), L::I), DOWN = outputs_of(L::I * sizeof(T), L::N);
    static constexpr int UP_BLOCKS = (L::I + UP - 1) / UP, DOWN_BLOCKS = (L::N + DOWN - 1) / DOWN;

    // Gate and up are two matrices, or one whose outputs come in pairs, or there is one projection.
    static constexpr int MATRICES = L::PAIRED ? 1 : L::PARTS, OUTPUTS = L::PAIRED ? 2 : 1;

    const Call& c;
    const int32_t* order;
    Segments segments;

    // The weights of a task: where each part begins, or nothing where its rows do not lie side by side.
    Next up_next(Segment s, int block) const {
        Next next{{nullptr, nullptr}, 0};
        if (!L::UP_NK) return next;
        int n = L::I - block * UP < UP ? L::I - block * UP : UP;
        for (int p = 0; p < MATRICES; p++) next.at[p] = c.up[p].of(s.expert) + (int64_t)block * UP * OUTPUTS * c.up[p].row;
        next.bytes = (int64_t)n * OUTPUTS * c.up[0].row;
        return next;
    }
    Next down_next(Segment s, int block) const {
        if (!L::DOWN_NK) return {{nullptr, nullptr}, 0};
        int n = L::N - block * DOWN < DOWN ? L::N - block * DOWN : DOWN;
        return {{c.down.of(s.expert) + (int64_t)block * DOWN * c.down.row, nullptr}, n * c.down.row};
    }

    static constexpr int K_PADDED = PADDED<T, L::K>, I_PADDED = PADDED<T, L::I>;
    T* packed_x(const Segment& s) const { return (T*)c.o + (int64_t)s.start * K_PADDED; }
    T* packed_a(const Segment& s) const { return (T*)c.a + (int64_t)s.start * I_PADDED; }
    // A thread's room for one tile's values as floats.
    float* wide() const { return (float*)c.wide + (int64_t)omp_get_thread_num() * TILE_TOKENS * (K_PADDED > I_PADDED ? K_PADDED : I_PADDED); }

    // The token rows of a segment, tile by tile.
    void pack(Segment s) const {
        constexpr int STEP = Chunk<T>::STEP;
        const Tiles tiles(s.rows);
        for (int tile = 0; tile < tiles.count; tile++) {
            const int t0 = tiles.start(tile), mt = tiles.size(tile);
            T* to = packed_x(s) + (int64_t)t0 * K_PADDED;
            for (int t = 0; t < mt; t++) {
                const T* row = (const T*)(c.x + order[s.start + t0 + t] / c.top_k * c.x_row);
                for (int k = 0; k + STEP <= L::K; k += STEP) memcpy(packed_at(to, mt, t, k), row + k, STEP * sizeof(T));
                if (L::K < K_PADDED) {
                    constexpr int k = L::K / STEP * STEP;
                    T tail[STEP] = {};
                    memcpy(tail, row + k, (L::K - k) * sizeof(T));
                    memcpy(packed_at(to, mt, t, k), tail, sizeof(tail));
                }
            }
        }
    }

    void up(Segment s, int block, const Next& next) const {
        const int i0 = block * UP, n = L::I - i0 < UP ? L::I - i0 : UP;
        const int stop = block + 1 < UP_BLOCKS ? n : I_PADDED - i0;  // the last block also writes the padding
        alignas(64) float bias[2][BLOCK];
        if (L::UP_BIAS)
            for (int p = 0; p < L::PARTS; p++) bias_block<T>(bias[p], c.up_bias[p], s.expert, i0, n);
        auto done = [&](int t0, int mt, const float* h, int ldh) {
            T* tile = packed_a(s) + (int64_t)t0 * I_PADDED;
            for (int t = 0; t < mt; t++) {
                for (int i = 0; i < stop; i += W) {
                    V a = zero();
                    if (i < n) {
                        V g, u;
                        if constexpr (L::PAIRED) {
                            load_pairs(h + t * ldh + 2 * i, g, u);
                        } else {
                            g = load(h + t * ldh + i);
                            u = load(h + t * ldh + (L::PARTS - 1) * BLOCK + i);
                        }
                        g = round_to<T>(g);
                        u = round_to<T>(u);
                        if (L::UP_BIAS) {
                            g = round_to<T>(g + load(bias[0] + i));
                            u = round_to<T>(u + load(bias[L::PARTS - 1] + i));
                        }
                        a = keep_n(L::activation(g, u, c.captures, i0 + i, n - i), n - i);
                    }
                    store_n(packed_at(tile, mt, t, i0 + i), a, W);
                }
            }
        };
        const char* w[2];
        for (int p = 0; p < MATRICES; p++)
            w[p] = c.up[p].of(s.expert) + (int64_t)i0 * OUTPUTS * (L::UP_NK ? c.up[p].row : (int64_t)sizeof(T));
        if constexpr (L::UP_NK) dot_block<T, L::K, MATRICES>(w, c.up[0].row, n * OUTPUTS, packed_x(s), Tiles(s.rows), next, done);
        else outer_block<T, L::K, MATRICES>(w, c.up[0].row, n * OUTPUTS, packed_x(s), Tiles(s.rows), wide(), done);
    }

    void down(Segment s, int block, const Next& next) const {
        const int n0 = block * DOWN, n = L::N - n0 < DOWN ? L::N - n0 : DOWN;
        alignas(64) float bias[BLOCK];
        if (L::DOWN_BIAS) bias_block<T>(bias, c.down_bias, s.expert, n0, n);
        auto done = [&](int t0, int mt, const float* h, int ldh) {
            for (int t = 0; t < mt; t++) {
                T* o = (T*)c.o + (int64_t)order[s.start + t0 + t] * L::N + n0;
                for (int i = 0; i < n; i += W) {
                    V v = load(h + t * ldh + i);
                    if (L::DOWN_BIAS) v = round_to<T>(v) + load(bias + i);
                    store_n(o + i, v, n - i);
                }
            }
        };
        const char* w = c.down.of(s.expert) + n0 * (L::DOWN_NK ? c.down.row : (int64_t)sizeof(T));
        if constexpr (L::DOWN_NK) dot_block<T, L::I, 1>(&w, c.down.row, n, packed_a(s), Tiles(s.rows), next, done);
        else outer_block<T, L::I, 1>(&w, c.down.row, n, packed_a(s), Tiles(s.rows), wide(), done);
    }

    // A token's rows times their weights, each product rounded, added in the order of k.
    void combine(int64_t token) const {
        using R = typename L::Product;
        const int64_t first = token * c.top_k;
        auto* out = (typename L::Out*)c.out + token * L::N;
        for (int n = 0; n < L::N; n += W) {
            V sum = zero();
            for (int64_t s = first; s < first + c.top_k; s++) {
                if (c.ids[s] < 0 || c.ids[s] >= L::E) continue;
                V weight = broadcast((const typename L::Weight*)c.weights + s);
                sum = sum + round_to<R>(load_n((const T*)c.o + s * L::N + n, L::N - n) * weight);
            }
            store_n(out + n, round_to<R>(sum), L::N - n);
        }
    }

    // Tasks are taken one at a time by whoever is free, each thread knowing the one after its own.
    template <class Do> static void share(std::atomic<int>& counter, int total, Do&& run) {
        int task = counter.fetch_add(1, std::memory_order_relaxed);
        while (task < total) {
            int after = counter.fetch_add(1, std::memory_order_relaxed);
            run(task, after < total ? after : -1);
            task = after;
        }
    }

    void run() const {
        std::atomic<int> pack_tasks{0}, up_tasks{0}, down_tasks{0};
#pragma omp parallel num_threads((int)c.threads)
        {
            Segments::Cursor here, there;
            share(pack_tasks, segments.count, [&](int task, int) { pack(segments.at(task, here)); });
#pragma omp barrier
            here = {};
            share(up_tasks, segments.count * UP_BLOCKS, [&](int task, int after) {
                Next next{{nullptr, nullptr}, 0};
                if (after >= 0) next = up_next(segments.at(after / UP_BLOCKS, there), after % UP_BLOCKS);
                up(segments.at(task / UP_BLOCKS, here), task % UP_BLOCKS, next);
            });
#pragma omp barrier
            here = there = {};
            share(down_tasks, segments.count * DOWN_BLOCKS, [&](int task, int after) {
                Next next{{nullptr, nullptr}, 0};
                if (after >= 0) next = down_next(segments.at(after / DOWN_BLOCKS, there), after % DOWN_BLOCKS);
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
    sort_slots(c, L::E, offsets, order);
    Layer<L>{c, order, Segments(offsets, L::E)}.run();
}

}  // namespace moec
