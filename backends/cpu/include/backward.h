// The layer's gradients, with nothing saved by the forward but its inputs. For each group of experts: rows of x and of
// the result's gradient dY packed; up GEMM and dY W_down, from which the activation's and the router weights' gradients
// follow; then the weights' gradients and the rows of x's. At last the rows of x's gradient are added token by token.
//
// With A the activation, w a slot's router weight and D = dY W_down: dA = w D, dw = <A, D> + <b_down, dY>, dW_down is the
// product of dY and w A. The down GEMM is not repeated. Every sum has one order, whatever the threads.
#pragma once
#include "derivative.h"
#include "plan.h"

namespace moec {

template <class L> struct Backward {
    using P = Plan<L>;
    using T = typename L::T;
    static constexpr int MATRICES = P::MATRICES, OUTPUTS = P::OUTPUTS, WIDTH = P::WIDTH, BLOCK = P::BLOCK;
    static constexpr int X_BLOCK = 256, X_BLOCKS = (L::K + X_BLOCK - 1) / X_BLOCK;
    static constexpr int LDH = L::PARTS * BLOCK;  // of a row's sums of the up GEMM

    const BackwardCall& c;
    const P plan;
    Packed<T>*x, *dy, *dh, *a_t, *dh_t;
    float* dots;
    T* dx_rows;
    char* rooms;
    const bool up_wanted, down_wanted, h_wanted, d_wanted;

    explicit Backward(const BackwardCall& call)
        : c(call),
          plan(call.plan),
          up_wanted(wanted(c.d_up) || wanted(c.d_up_bias)),
          down_wanted(c.d_down.wanted() || c.d_down_bias.wanted()),
          h_wanted(c.dx || up_wanted),
          d_wanted(h_wanted || c.dweights) {
        char* at = c.work;
        auto take = [&](int64_t size) {
            char* p = at;
            at += size;
            return p;
        };
        x = (Packed<T>*)take(c.work_rows * P::X_ROW);
        dy = (Packed<T>*)take(c.work_rows * P::DY_ROW);
        dh = (Packed<T>*)take(c.work_rows * P::DH_ROW);
        a_t = (Packed<T>*)take(c.work_rows * P::A_ROW);
        dh_t = (Packed<T>*)take(c.work_rows * P::DHT_ROW);
        dots = (float*)take(P::dots_bytes(c.tokens * c.top_k));
        dx_rows = (T*)take(P::slots_bytes(c.tokens * c.top_k));
        rooms = at;
    }
    static bool wanted(const Gradient* g) { return g[0].wanted() || g[1].wanted(); }

    // Packed rows of a piece; columns of an expert.
    Packed<T>* x_of(const Piece& s) const { return x + (int64_t)s.pad * P::K_PADDED; }
    Packed<T>* dy_of(const Piece& s) const { return dy + (int64_t)s.pad * P::N_PADDED; }
    Packed<T>* dh_of(const Piece& s, int matrix) const {
        return dh + ((int64_t)matrix * c.work_rows + s.pad) * P::H_PADDED;
    }
    Columns<T> a_columns(int e) const {
        return {a_t + (int64_t)plan.pads[e] * L::I / Step<T>::DEPTH, L::I, plan.whole(e)};
    }
    Columns<T> dh_columns(int e, int matrix) const {
        const int64_t first = (int64_t)plan.pads[e] * MATRICES + (int64_t)matrix * plan.whole(e);
        return {dh_t + first * WIDTH / Step<T>::DEPTH, WIDTH, plan.whole(e)};
    }
    Rows rows_of(int e, const char* base, int64_t row) const {
        return {base, row, plan.order + plan.offsets[e], c.top_k, plan.rows(e)};
    }

    // The up weights that give a block of activations; the down weights that give its gradient; the up weights that
    // give a block of x's gradient.
    Operand up_block(int e, int matrix, int i0) const {
        const Matrix& m = c.up[matrix];
        const int n = L::I - i0 < BLOCK ? L::I - i0 : BLOCK;
        return {m.of(e) + (int64_t)i0 * OUTPUTS * (L::UP_NK ? m.row : (int64_t)sizeof(T)), m.row, n * OUTPUTS, L::K, L::UP_NK};
    }
    Operand down_block(int e, int i0) const {
        const int n = L::I - i0 < BLOCK ? L::I - i0 : BLOCK;
        return {c.down.of(e) + (int64_t)i0 * (L::DOWN_NK ? (int64_t)sizeof(T) : c.down.row), c.down.row, n, L::N, !L::DOWN_NK};
    }
    Operand x_block(int e, int matrix, int n0) const {
        const Matrix& m = c.up[matrix];
        const int n = L::K - n0 < X_BLOCK ? L::K - n0 : X_BLOCK;
        return {m.of(e) + (int64_t)n0 * (L::UP_NK ? (int64_t)sizeof(T) : m.row), m.row, n, WIDTH, !L::UP_NK};
    }

    void pack(const Piece& s, int tile) const {
        const Tiles tiles(s.rows);
        const int t0 = tiles.start(tile), mt = tiles.size(tile);
        for (int t = 0; t < mt; t++) {
            const int64_t token = plan.order[s.start + t0 + t] / c.top_k;
            pack_row<T, L::K>(x_of(s) + (int64_t)t0 * P::K_PADDED, mt, t, (const T*)(c.x + token * c.x_row));
            if (d_wanted) pack_row<T, L::N>(dy_of(s) + (int64_t)t0 * P::N_PADDED, mt, t, (const T*)(c.dy + token * c.dy_row));
        }
    }

    // A block of activations of a piece: its gradients, in the forms that the GEMMs after it read.
    void activations(const Piece& s, int block, const Operand& next, float* room) const {
        const int e = s.expert, i0 = block * BLOCK, n = L::I - i0 < BLOCK ? L::I - i0 : BLOCK;
        const Tiles tiles(s.rows);
        float *h = room + PANEL_BYTES / sizeof(float), *d = h + s.rows * LDH;
        for (int m = 0; m < MATRICES; m++) {
            const Operand after = m + 1 < MATRICES ? up_block(e, m + 1, i0) : d_wanted ? down_block(e, i0) : next;
            product<T>(up_block(e, m, i0), x_of(s), tiles, h + m * BLOCK, LDH, false, after, room);
        }
        if (d_wanted) product<T>(down_block(e, i0), dy_of(s), tiles, d, BLOCK, false, next, room);

        alignas(64) float bias[2][BLOCK + W];
        if (L::UP_BIAS)
            for (int p = 0; p < L::PARTS; p++) bias_block<T>(bias[p], c.up_bias[p], e, i0, n);
        Packed<T>* to[MOST_ROWS];  // of every row: its tile and its place there
        int size[MOST_ROWS], place[MOST_ROWS];
        for (int tile = 0; tile < tiles.count; tile++)
            for (int t = 0; t < tiles.size(tile); t++) {
                const int r = tiles.start(tile) + t;
                to[r] = dh_of(s, 0) + (int64_t)tiles.start(tile) * P::H_PADDED;
                size[r] = tiles.size(tile);
                place[r] = t;
            }
        const int local = s.start - plan.offsets[e];
        // The last block also writes the zeros that end a row, and the last piece those that end a column.
        const int stop = block + 1 < P::BLOCKS ? n : up_to(L::I, RUN<T>) - i0;
        for (int r0 = 0; r0 < up_to(s.rows, RUN<T>); r0 += W) {
            V dot[W];
            for (int j = 0; j < W; j++) dot[j] = zero();
            for (int i = 0; i < stop; i += W) {
                V a[W], dg[W], du[W];
                for (int j = 0; j < W; j++) {
                    const int r = r0 + j;
                    a[j] = dg[j] = du[j] = zero();
                    if (r >= s.rows) continue;
                    if (i < n) {
                        const V weight = broadcast((const typename L::Weight*)c.weights + plan.order[s.start + r]);
                        V g, u, slope = d_wanted ? keep_n(load(d + r * BLOCK + i), n - i) : zero();
                        if constexpr (L::PAIRED) {
                            load_pairs(h + r * LDH + 2 * i, g, u);
                        } else {
                            g = load(h + r * LDH + i);
                            u = load(h + r * LDH + (L::PARTS - 1) * BLOCK + i);
                        }
                        g = round_to<T>(g);
                        u = round_to<T>(u);
                        if (L::UP_BIAS) {
                            g = round_to<T>(g + load(bias[0] + i));
                            u = round_to<T>(u + load(bias[L::PARTS - 1] + i));
                        }
                        L::backward(g, u, slope * weight, c.captures, i0 + i, n - i, a[j], dg[j], du[j]);
                        a[j] = keep_n(a[j], n - i);
                        dg[j] = keep_n(dg[j], n - i);
                        du[j] = keep_n(du[j], n - i);
                        dot[j] = fma(a[j], slope, dot[j]);
                        a[j] = a[j] * weight;
                    }
                    if (c.dx) put_row(to[r], size[r], place[r], i0 + i, dg[j], du[j]);
                }
                if (i >= n) continue;
                if (c.d_down.wanted()) put_columns(a_columns(e), i0 + i, 1, n - i, local + r0, a);
                if (up_wanted) {
                    put_columns(dh_columns(e, 0), (i0 + i) * OUTPUTS, OUTPUTS, n - i, local + r0, dg);
                    if (L::PARTS > 1) put_columns(dh_columns(e, MATRICES - 1), (i0 + i) * OUTPUTS + OUTPUTS - 1, OUTPUTS, n - i, local + r0, du);
                }
            }
            if (c.dweights)
                for (int j = 0; j < W && r0 + j < s.rows; j++) dots[(int64_t)(s.start + r0 + j) * P::BLOCKS + block] = sum_lanes(dot[j]);
        }
    }
    void put_row(Packed<T>* tile, int size, int place, int i, V dg, V du) const {
        if constexpr (L::PAIRED) {
            V low, high;
            interleave(dg, du, low, high);
            if (2 * i < up_to(WIDTH, RUN<T>)) Step<T>::put(packed_at<T>(tile, size, place, 2 * i), low);
            if (2 * i + W < up_to(WIDTH, RUN<T>)) Step<T>::put(packed_at<T>(tile, size, place, 2 * i + W), high);
        } else {
            Step<T>::put(packed_at<T>(tile, size, place, i), dg);
            if (L::PARTS > 1) Step<T>::put(packed_at<T>(tile + c.work_rows * P::H_PADDED, size, place, i), du);
        }
    }
    // W rows of up to W columns, `by` apart.
    static inline void put_columns(const Columns<T>& to, int column, int by, int n, int row, V* v) {
        transpose(v);
        for (int q = 0; q < W && q < n; q++) Step<T>::put(to.at(column + q * by, row), v[q]);
    }

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
        if (char* to = g.of(e)) outer<T>(left, rows_of(e, c.x, c.x_row), L::K, o0, c0, to, g.row, g.by_left, room);
        char* bias = c.d_up_bias[matrix].of(e);
        for (int o = o0; bias && c0 == 0 && o < o0 + Cut(g.by_left).outputs && o < WIDTH; o++)
            store_n((T*)(bias + o * c.d_up_bias[matrix].row), set1(left.sum(o)), 1);
    }
    // Of the down weights the activations are the outputs here, so that dY is read where it lies.
    void down_part(int e, int part, float* room) const {
        const Gradient& g = c.d_down;
        const int at = Parts(g, L::I, L::N).columns, o0 = part / at * Cut(g.by_left).outputs, c0 = part % at * Cut(g.by_left).columns;
        const Rows right = rows_of(e, c.dy, c.dy_row);
        if (char* to = g.of(e)) outer<T>(a_columns(e), right, L::N, o0, c0, to, g.row, g.by_left, room);
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
    // Tasks are numbered expert by expert; a cursor only moves forward.
    struct Cursor {
        int expert, before;
    };
    template <class Count> static int find(Cursor& k, int task, Count&& count) {
        while (task >= k.before + count(k.expert)) k.before += count(k.expert++);
        return task - k.before;
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

    // Experts without rows.
    static void clear(const Gradient& g, int e, int outputs, int columns) {
        char* to = g.of(e);
        const int lines = g.by_left ? outputs : columns, length = g.by_left ? columns : outputs;
        for (int i = 0; to && i < lines; i++) memset(to + i * g.row, 0, length * sizeof(T));
    }
    static void clear_bias(const Gradient& g, int e, int n) {
        char* to = g.of(e);
        for (int i = 0; to && i < n; i++) memset(to + i * g.row, 0, sizeof(T));
    }
    void idle(int e) const {
        for (int m = 0; m < MATRICES; m++) {
            clear(c.d_up[m], e, WIDTH, L::K);
            clear_bias(c.d_up_bias[m], e, WIDTH);
        }
        clear(c.d_down, e, L::I, L::N);
        clear_bias(c.d_down_bias, e, L::N);
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
