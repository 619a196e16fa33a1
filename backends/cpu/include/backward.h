// The layer's gradients, with nothing saved by the forward but its inputs. For each group of experts: rows of x and of
// the result's gradient dY packed; up GEMM and dY W_down, from which the activation's and the router weights' gradients
// follow; then the weights' gradients and the rows of x's. At last the rows of x's gradient are added token by token.
//
// With A the activation, w a slot's router weight and D = dY W_down: dA = w D, dw = <A, D> + <b_down, dY>, dW_down is the
// product of dY and w A. The down GEMM is not repeated. Every sum has one order, whatever the threads.
#pragma once
#include "recompute.h"

namespace moec {

template <class L> struct Backward : Recompute<L> {
    using Base = Recompute<L>;
    using P = typename Base::P;
    using T = typename Base::T;
    using Tiles = typename Base::Tiles;
    using Base::c, Base::plan, Base::dots, Base::dx_rows, Base::rooms, Base::up_wanted, Base::down_wanted, Base::d_wanted;
    using Base::Base, Base::MATRICES, Base::WIDTH, Base::BLOCK, Base::X_BLOCK, Base::X_BLOCKS;
    using Base::a_columns, Base::dh_columns, Base::dh_of, Base::rows_of, Base::up_block, Base::x_block, Base::pack, Base::activations;

    void x_rows(const Piece& s, int block, const Operand& next, float* room) const {
        const int n0 = block * X_BLOCK, n = L::K - n0 < X_BLOCK ? L::K - n0 : X_BLOCK;
        float* sums = room + PANEL_BYTES / sizeof(float);
        for (int m = 0; m < MATRICES; m++)
            product<T>(x_block(s.expert, m, n0), dh_of(s, m), Tiles(s.rows), sums, X_BLOCK, m > 0,
                       m + 1 < MATRICES ? x_block(s.expert, m + 1, n0) : next, room);
        for (int r = 0; r < s.rows; r++) {
            T* to = dx_rows + (int64_t)plan.order[s.start + r] * L::K + n0;
            for (int i = 0; i < n; i += W) store_n(to + i, load(sums + r * X_BLOCK + i), n - i);
        }
    }

    static constexpr bool PAST = L::E * ((int64_t)MATRICES * WIDTH * L::K + (int64_t)L::I * L::N) * sizeof(T) > 64 << 20;  // bytes of gradients

    // Tasks of a kind of weights: parts of its gradient.
    struct Parts {
        int outputs, columns, count;
        Parts(const Gradient& g, int width, int k)
            : outputs((width + Cut(g.by_left).outputs - 1) / Cut(g.by_left).outputs), columns((k + Cut(g.by_left).columns - 1) / Cut(g.by_left).columns),
              count(outputs * columns) {}
    };
    void up_part(int e, int matrix, int part, float* room) const {
        const Gradient& g = c.d_up[matrix];
        const int at = Parts(g, WIDTH, L::K).columns, o0 = part / at * Cut(g.by_left).outputs, c0 = part % at * Cut(g.by_left).columns;
        const Columns<T> left = dh_columns(e, matrix);
        if (char* to = g.of(e)) outer<T, PAST>(left, rows_of(e, c.x, c.x_row), L::K, o0, c0, to, g.row, g.by_left, room);
        char* bias = c.d_up_bias[matrix].of(e);
        for (int o = o0; bias && c0 == 0 && o < o0 + Cut(g.by_left).outputs && o < WIDTH; o++)
            store_n((T*)(bias + o * c.d_up_bias[matrix].row), set1(left.sum(o)), 1);
    }
    // Of the down weights the activations are the outputs here, so that dY is read where it lies.
    void down_part(int e, int part, float* room) const {
        const Gradient& g = c.d_down;
        const int at = Parts(g, L::I, L::N).columns, o0 = part / at * Cut(g.by_left).outputs, c0 = part % at * Cut(g.by_left).columns;
        const Rows right = rows_of(e, c.dy, c.dy_row);
        if (char* to = g.of(e)) outer<T, PAST>(a_columns(e), right, L::N, o0, c0, to, g.row, g.by_left, room);
        char* bias = c.d_down_bias.of(e);
        for (int n = c0; bias && o0 == 0 && n < c0 + Cut(g.by_left).columns && n < L::N; n += W) {
            const int some = L::N - n < W ? L::N - n : W;
            V sum = zero();
            for (int r = 0; r < right.count; r++)
                sum = fma(load_n((const T*)right.of(r) + n, some), broadcast((const typename L::Weight*)c.weights + right.order[r]), sum);
            alignas(64) float each[W];
            store(each, sum);
            for (int i = 0; i < some; i++) store_n((T*)(bias + (n + i) * c.d_down_bias.row), set1(each[i]), 1);
        }
    }

    // An expert's tasks after its activations: blocks of x's rows, then parts of gradients.
    struct Counts {
        int x, up, down;
        int all() const { return x + MATRICES * up + down; }
    };
    Counts counts(int e) const {
        if (!plan.rows(e)) return {0, 0, 0};
        return {c.dx ? plan.pieces(e) * X_BLOCKS : 0, up_wanted ? Parts(c.d_up[0], WIDTH, L::K).count : 0,
                down_wanted ? Parts(c.d_down, L::I, L::N).count : 0};
    }
    Operand first_of(Cursor& k, int task) const {
        const int i = find(k, task, [&](int e) { return counts(e).all(); });
        if (i >= counts(k.expert).x) return {nullptr, 0, 0, 0, false};
        return x_block(k.expert, 0, i % X_BLOCKS * X_BLOCK);
    }
    void gradients(Cursor& k, int task, const Operand& next, float* room) const {
        int i = find(k, task, [&](int e) { return counts(e).all(); });
        const Counts n = counts(k.expert);
        if (i < n.x) return x_rows(plan.piece(k.expert, i / X_BLOCKS), i % X_BLOCKS, next, room);
        i -= n.x;
        if (i < MATRICES * n.up) return up_part(k.expert, i / n.up, i % n.up, room);
        down_part(k.expert, i - MATRICES * n.up, room);
    }

    // An expert without rows.
    void idle(int e) const {
        for (int m = 0; m < MATRICES; m++) {
            c.d_up[m].template clear<T>(e, WIDTH, L::K);
            c.d_up_bias[m].template clear<T>(e, 1, WIDTH);
        }
        c.d_down.template clear<T>(e, L::I, L::N);
        c.d_down_bias.template clear<T>(e, 1, L::N);
    }

    void router_weight(int e, int row) const {
        const int64_t slot = plan.order[row];
        float sum = 0;
        for (int b = 0; b < P::BLOCKS; b++) sum += dots[(int64_t)row * P::BLOCKS + b];
        if (L::DOWN_BIAS) {
            const T* grad = (const T*)(c.dy + slot / c.top_k * c.dy_row);
            V dot = zero();
            for (int n = 0; n < L::N; n += W) {
                alignas(64) float bias[2 * W];
                const int some = L::N - n < W ? L::N - n : W;
                bias_block<T>(bias, c.down_bias, e, n, some);
                dot = fma(keep_n(load(bias), some), load_n(grad + n, some), dot);
            }
            sum += sum_lanes(dot);
        }
        store_n((typename L::Weight*)c.dweights + slot, set1(sum), 1);
    }
    // A token's rows of x's gradient, added in the order of k.
    void combine(int64_t token) const {
        const int64_t first = token * c.top_k;
        for (int n = 0; n < L::K; n += W) {
            V sum = zero();
            for (int64_t s = first; s < first + c.top_k; s++)
                if (c.ids[s] >= 0 && c.ids[s] < L::E) sum = sum + load_n(dx_rows + s * L::K + n, L::K - n);
            store_n((T*)c.dx + token * L::K + n, sum, L::K - n);
        }
    }

    void run() const {
        const int groups = plan.count[0];
        const Operand none{nullptr, 0, 0, 0, false};
        std::atomic<int> idle_tasks{0};
        // One pair of counters a group would do; two pairs are reused in turn, so that their number is fixed.
        std::atomic<int> counters[2][2] = {};
#pragma omp parallel num_threads((int)c.threads)
        {
            const int me = omp_get_thread_num(), team = omp_get_num_threads();
            float* room = (float*)(rooms + me * P::ROOM);
            for (int group = 0; group < groups; group++) {
                const int first = plan.firsts[group], last = plan.firsts[group + 1];
                auto total = [&](auto&& count) {
                    int n = 0;
                    for (int e = first; e < last; e++) n += count(e);
                    return n;
                };
                int turn = 0;
                for (int e = first; e < last; e++)
                    for (int i = 0; i < (plan.rows(e) ? plan.pieces(e) : 0); i++) {
                        const Piece s = plan.piece(e, i);
                        for (int tile = 0; tile < Tiles(s.rows).count; tile++)
                            if (turn++ % team == me) pack(s, tile);
                    }
#pragma omp barrier
                auto& now = counters[group % 2];
                auto blocks = [&](int e) { return plan.rows(e) ? plan.pieces(e) * P::BLOCKS : 0; };
                Cursor here{first, 0}, there{first, 0};
                const bool rows_wanted = d_wanted || c.d_down.wanted();
                share(now[0], rows_wanted ? total(blocks) : 0, [&](int task, int after) {
                    Operand next = none;
                    if (after >= 0) {
                        const int i = find(there, after, blocks);
                        next = up_block(there.expert, 0, i % P::BLOCKS * BLOCK);
                    }
                    const int i = find(here, task, blocks);
                    activations(plan.piece(here.expert, i / P::BLOCKS), i % P::BLOCKS, next, room);
                });
#pragma omp barrier
#pragma omp master
                counters[(group + 1) % 2][0] = counters[(group + 1) % 2][1] = 0;
                here = there = {first, 0};
                share(now[1], total([&](int e) { return counts(e).all(); }), [&](int task, int after) {
                    gradients(here, task, after >= 0 ? first_of(there, after) : none, room);
                });
            }
            share(idle_tasks, L::E, [&](int e, int) {
                if (!plan.rows(e)) idle(e);
            });
#pragma omp barrier
            const int64_t rows = plan.offsets[L::E];
            int e = 0;
            for (int64_t r = rows * me / team; c.dweights && r < rows * (me + 1) / team; r++) {
                while (r >= plan.offsets[e + 1]) e++;
                router_weight(e, (int)r);
            }
            for (int64_t t = c.tokens * me / team; c.dx && t < c.tokens * (me + 1) / team; t++) combine(t);
        }
    }
};

}  // namespace moec
