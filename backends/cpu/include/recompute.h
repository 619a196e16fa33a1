// The first half of the backward: rows packed, the up GEMM and the activation again, and the activation's gradients in
// the forms that the GEMMs after them read.
#pragma once
#include "derivative.h"
#include "plan.h"

namespace moec {

template <class L> struct Recompute {
    using P = Plan<L>;
    using T = typename L::T;
    using Tiles = typename Sweep<T>::Tiles;
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

    explicit Recompute(const BackwardCall& call)
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
                if (c.d_down.wanted()) a_columns(e).put(i0 + i, 1, n - i, local + r0, a);
                if (up_wanted) {
                    dh_columns(e, 0).put((i0 + i) * OUTPUTS, OUTPUTS, n - i, local + r0, dg);
                    if (L::PARTS > 1)
                        dh_columns(e, MATRICES - 1).put((i0 + i) * OUTPUTS + OUTPUTS - 1, OUTPUTS, n - i, local + r0, du);
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
};

}  // namespace moec
