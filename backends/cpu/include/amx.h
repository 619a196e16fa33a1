// Sums of products of bf16 tiles on AMX: 16 x 32 by 32 x 16 elements, up to two by two tiles at a time.
//
// An element of the result is a chain of tile products along K, 32 elements each, in their order. Where it lies in a tile,
// what else is in the tile and how K is sliced change nothing of it: between slices the sums are kept as they are.
#pragma once
#include "amx_tiles.h"
#include "types.h"

namespace moec {
namespace amx {

constexpr int TILE = 16;  // rows of a tile, and pairs of bf16 in each
constexpr int TILE_FLOATS = TILE * TILE;

// A tile's place for every product along K: `row` bytes between its rows, `step` bytes from one product to the next. `size`
// is its rows on the left, its columns on the right.
struct Operand {
    const char* at;
    int64_t row, step;
    int size;
};

// The sums of two by two tiles: `a` and `b` floats from one to the next, `row` bytes between the rows of one.
struct Sums {
    float* at;
    int64_t a, b, row;
};

// Memory that is wanted soon: with every product some rows of `across` lines, `row` bytes apart, and the next time what lies
// `step` bytes further.
struct Fetch {
    const char* line = nullptr;
    int64_t row = 0, step = 0;
    int rows = 0, across = 1;

    inline __attribute__((always_inline)) void next() {
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < across; i++) _mm_prefetch(line + r * row + i * 64, _MM_HINT_T1);
        line += step;
    }
};
struct TwoFetches {
    Fetch first, second;
    inline __attribute__((always_inline)) void next() { first.next(), second.next(); }
};

// This thread's tiles: 0 to 3 hold sums, 4 and 5 what is on the left, 6 and 7 what is on the right.
class Shapes {
    int now[4] = {0, 0, 0, 0};

public:
    Shapes() = default;
    Shapes(const Shapes&) = delete;
    ~Shapes() { TILE_RELEASE(); }

    void set(int a0, int a1, int b0, int b1) {
        if (now[0] == a0 && now[1] == a1 && now[2] == b0 && now[3] == b1) return;
        now[0] = a0, now[1] = a1, now[2] = b0, now[3] = b1;
        TileShapes shapes;
        for (int i = 0; i < 2; i++) {
            shapes.set(2 * i, now[i], 4 * b0);
            shapes.set(2 * i + 1, now[i], 4 * b1);
            shapes.set(4 + i, now[i], 64);
            shapes.set(6 + i, TILE, 4 * now[2 + i]);
        }
        TILE_SHAPES(&shapes);
    }
};

// One product along K of A by B tiles.
template <int A, int B>
static inline __attribute__((always_inline)) void product(const char* a0, const char* a1, int64_t row_a, const char* b0, const char* b1,
                                                          int64_t row_b0, int64_t row_b1) {
    TILE_LOAD(6, b0, row_b0);
    TILE_LOAD(4, a0, row_a);
    TILE_PRODUCT(0, 4, 6);
    if constexpr (B == 2) {
        TILE_LOAD(7, b1, row_b1);
        TILE_PRODUCT(1, 4, 7);
    }
    if constexpr (A == 2) {
        TILE_LOAD(5, a1, row_a);
        TILE_PRODUCT(2, 5, 6);
        if constexpr (B == 2) TILE_PRODUCT(3, 5, 7);
    }
}

// c (+)= a * b over `steps` products along K, and one more of the left tiles in `last` where there are such: those lie
// TILE_FLOATS floats apart, each with rows of 64 bytes. soon.next() asks for memory, once with every product.
template <int A, int B, class Soon>
static __attribute__((noinline)) void tiles(const Operand* a, const Operand* b, int steps, const char* last, const Sums& c, bool add,
                                            Soon& soon) {
    const char *a0 = a[0].at, *a1 = a[A - 1].at, *b0 = b[0].at, *b1 = b[B - 1].at;
    const int64_t row_a = a[0].row, row_b0 = b[0].row, row_b1 = b[B - 1].row;
    float *c0 = c.at, *c2 = c.at + c.a;
    if (add) {
        TILE_LOAD(0, c0, c.row);
        if constexpr (B == 2) TILE_LOAD(1, c0 + c.b, c.row);
        if constexpr (A == 2) TILE_LOAD(2, c2, c.row);
        if constexpr (A == 2 && B == 2) TILE_LOAD(3, c2 + c.b, c.row);
    } else {
        TILE_ZERO(0);
        if constexpr (B == 2) TILE_ZERO(1);
        if constexpr (A == 2) TILE_ZERO(2);
        if constexpr (A == 2 && B == 2) TILE_ZERO(3);
    }
    for (int i = 0; i < steps; i++) {
        soon.next();
        product<A, B>(a0, a1, row_a, b0, b1, row_b0, row_b1);
        a0 += a[0].step, a1 += a[A - 1].step, b0 += b[0].step, b1 += b[B - 1].step;
    }
    if (last) product<A, B>(last, last + TILE_FLOATS * sizeof(float), 64, b0, b1, row_b0, row_b1);
    TILE_STORE(0, c0, c.row);
    if constexpr (B == 2) TILE_STORE(1, c0 + c.b, c.row);
    if constexpr (A == 2) TILE_STORE(2, c2, c.row);
    if constexpr (A == 2 && B == 2) TILE_STORE(3, c2 + c.b, c.row);
}

// The same for one or two tiles on each side.
template <class Soon>
static inline void tiles_of(Shapes& shapes, const Operand* a, int na, const Operand* b, int nb, int steps, const char* last, const Sums& c,
                            bool add, Soon& soon) {
    shapes.set(a[0].size, a[na - 1].size, b[0].size, b[nb - 1].size);
    if (na == 2 && nb == 2) tiles<2, 2>(a, b, steps, last, c, add, soon);
    else if (na == 2) tiles<2, 1>(a, b, steps, last, c, add, soon);
    else if (nb == 2) tiles<1, 2>(a, b, steps, last, c, add, soon);
    else tiles<1, 1>(a, b, steps, last, c, add, soon);
}

}  // namespace amx
}  // namespace moec
