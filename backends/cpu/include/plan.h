// The backward's plan: experts in groups that are worked on together, and the memory that a group's rows take.
//
// A group keeps its rows in packed forms until its weights' gradients are done, so memory is that of the largest group
// and not of all slots.
#pragma once
#include "experts.h"
#include "product.h"

namespace moec {

constexpr int MOST_ROWS = 256;             // most rows of an expert in one task
constexpr int64_t GROUP_BYTES = 16 << 20;  // rows of a group in their packed forms, unless one expert has more

// Gradients of a kind of weights, wanted by some experts, all or none. As Matrix; of a bias, `row` leads from one element
// to the next.
struct Gradient {
    char* const* table;
    char* base;
    int64_t expert, row;
    int64_t by_left;  // rows in memory belong to the left factor: outputs of the up GEMM, or activations

    char* of(int64_t e) const {
        if (table) return table[e] ? table[e] + (int64_t)base : nullptr;
        return base ? base + e * expert : nullptr;
    }
    bool wanted() const { return table || base; }
    // Zeros; of a bias (by_left = 0), n lines of one element.
    template <class T> void clear(int64_t e, int outputs, int columns) const {
        char* to = of(e);
        const int lines = by_left ? outputs : columns, length = by_left ? columns : outputs;
        for (int i = 0; to && i < lines; i++) memset(to + i * row, 0, length * sizeof(T));
    }
};

// What Python passes: 64-bit fields alone, in this order.
struct BackwardCall {
    const char* x;
    int64_t x_row;  // bytes
    const char* dy;
    int64_t dy_row;
    const int64_t* ids;
    const char* weights;
    int64_t tokens, top_k, threads;
    int32_t* plan;
    char* work;
    int64_t work_rows;  // of the largest group
    char *dx, *dweights;  // contiguous, or null
    Matrix up[2], down, up_bias[2], down_bias;
    Gradient d_up[2], d_down, d_up_bias[2], d_down_bias;  // of matrices: interleaved rows and one projection are one
    const void* const* captures;
};

// Tasks are numbered expert by expert; a cursor only moves forward. Returns the number among its expert's.
struct Cursor {
    int expert, before;
};
template <class Count> static inline int find(Cursor& k, int task, Count&& count) {
    while (task >= k.before + count(k.expert)) k.before += count(k.expert++);
    return task - k.before;
}

// Rows of one expert for one task. They lie from `pad` on in their group's memory, whole runs for every expert.
struct Piece {
    int expert, start, rows, pad;
};

template <class L> struct Plan {
    using T = typename L::T;
    static constexpr int MATRICES = L::PAIRED ? 1 : L::PARTS, OUTPUTS = L::PAIRED ? 2 : 1, WIDTH = L::I * OUTPUTS;
    static constexpr int BLOCK = 128, BLOCKS = (L::I + BLOCK - 1) / BLOCK;  // of activations, in a task
    static constexpr int K_PADDED = PADDED<T, L::K>, N_PADDED = PADDED<T, L::N>, H_PADDED = PADDED<T, WIDTH>;
    static constexpr int64_t STEP = sizeof(Packed<T>), ELEMENT = STEP / Step<T>::DEPTH;
    static constexpr int64_t X_ROW = STEP * K_PADDED, DY_ROW = STEP * N_PADDED, DH_ROW = STEP * H_PADDED * MATRICES;
    static constexpr int64_t A_ROW = ELEMENT * L::I, DHT_ROW = ELEMENT * WIDTH * MATRICES;
    static constexpr int64_t ROW = X_ROW + DY_ROW + DH_ROW + A_ROW + DHT_ROW;
    static constexpr int64_t SUMS = (int64_t)MOST_ROWS * (L::PARTS + 1) * BLOCK;  // at least a block of x's gradient
    static constexpr int64_t ROOM = PANEL_BYTES + sizeof(float) * (SUMS > CUT_FLOATS ? SUMS : CUT_FLOATS);

    const int32_t *count, *offsets, *pads, *firsts, *order;

    explicit Plan(const int32_t* ints)
        : count(ints), offsets(ints + 1), pads(offsets + L::E + 1), firsts(pads + L::E), order(firsts + L::E + 1) {}

    int rows(int e) const { return offsets[e + 1] - offsets[e]; }
    int whole(int e) const { return up_to(rows(e), RUN<T>); }
    // Rows of a piece, whole runs but for the last one; it depends on the expert's rows alone.
    static int piece_rows(int rows) {
        const int n = (rows + MOST_ROWS - 1) / MOST_ROWS;
        return n ? up_to((rows + n - 1) / n, RUN<T>) : 1;
    }
    int pieces(int e) const { return (rows(e) + piece_rows(rows(e)) - 1) / piece_rows(rows(e)); }
    Piece piece(int e, int i) const {
        const int most = piece_rows(rows(e)), from = i * most, left = rows(e) - from;
        return {e, offsets[e] + from, left < most ? left : most, pads[e] + from};
    }

    // Sorts the slots and cuts the experts into groups; returns the rows of the largest.
    static int64_t make(const int64_t* ids, int64_t tokens, int64_t top_k, int64_t threads, int32_t* ints) {
        const Plan p(ints);
        auto *pads = (int32_t*)p.pads, *firsts = (int32_t*)p.firsts;
        sort_slots(ids, tokens * top_k, L::E, (int32_t*)p.offsets, (int32_t*)p.order);
        int64_t rows = 0, most = 0, tasks = 0;
        int groups = 0;
        firsts[0] = 0;
        for (int e = 0; e < L::E; e++) {
            const int whole = p.whole(e);
            // A group has work for all threads, however large its rows are.
            if (rows && whole && (rows + whole) * ROW > GROUP_BYTES && tasks >= 4 * threads) {
                firsts[++groups] = e;
                rows = tasks = 0;
            }
            pads[e] = (int32_t)rows;
            rows += whole;
            tasks += (int64_t)p.pieces(e) * BLOCKS;
            most = rows > most ? rows : most;
        }
        firsts[++groups] = L::E;
        ints[0] = groups;
        return most;
    }

    // Bytes of working memory.
    static int64_t dots_bytes(int64_t slots) { return lines(slots * BLOCKS * (int64_t)sizeof(float)); }
    static int64_t slots_bytes(int64_t slots) { return lines(slots * L::K * (int64_t)sizeof(T)); }
    static int64_t bytes(int64_t rows, int64_t slots, int64_t threads) {
        return rows * ROW + dots_bytes(slots) + slots_bytes(slots) + threads * ROOM;
    }
    static int64_t lines(int64_t size) { return (size + 63) / 64 * 64; }  // up to whole lines of the cache
};

}  // namespace moec
