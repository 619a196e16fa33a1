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

// Lines of memory that are wanted soon, some at every product: runs of `count` lines, `inner` bytes apart.
struct Fetch {
    const char* line = nullptr;
    int64_t inner = 0, outer = 0, left = 0;  // outer: from the last line of a run to the first of the next
    int count = 0, in_run = 0, each = 0;

    // Rows of a matrix: a line of each, then the next line of each, as tiles are read.
    static Fetch rows(const char* at, int64_t row, int n, int64_t bytes, int64_t steps) {
        return of(at, row, n, 64, (bytes + 63) / 64, steps);
    }
    // Rows one after the other.
    static Fetch runs(const char* at, int64_t row, int n, int64_t bytes, int64_t steps) {
        return of(at, 64, (int)((bytes + 63) / 64), row, n, steps);
    }
    inline __attribute__((always_inline)) void step() {
        int n = left < each ? (int)left : each;
        left -= n;
        for (; n > 0; n--) {
            _mm_prefetch(line, _MM_HINT_T1);
            line += inner;
            if (--in_run == 0) {
                line += outer;
                in_run = count;
            }
        }
    }

private:
    static Fetch of(const char* at, int64_t inner, int count, int64_t run, int64_t times, int64_t steps) {
        Fetch f;
        f.line = at, f.inner = inner, f.outer = run - inner * count, f.count = f.in_run = count;
        f.left = at ? times * count : 0;
        f.each = (int)((f.left + steps - 1) / steps);
        return f;
    }
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

// One product along K of A by B tiles. STREAM: what is on the left is not wanted again soon.
template <int A, int B, bool STREAM>
static inline __attribute__((always_inline)) void product(const char* a0, const char* a1, int64_t row_a, const char* b0, const char* b1,
                                                          int64_t row_b0, int64_t row_b1) {
    TILE_LOAD(6, b0, row_b0);
    if constexpr (STREAM) TILE_STREAM(4, a0, row_a);
    else TILE_LOAD(4, a0, row_a);
    TILE_PRODUCT(0, 4, 6);
    if constexpr (B == 2) {
        TILE_LOAD(7, b1, row_b1);
        TILE_PRODUCT(1, 4, 7);
    }
    if constexpr (A == 2) {
        if constexpr (STREAM) TILE_STREAM(5, a1, row_a);
        else TILE_LOAD(5, a1, row_a);
        TILE_PRODUCT(2, 5, 6);
        if constexpr (B == 2) TILE_PRODUCT(3, 5, 7);
    }
}

// c (+)= a * b over `steps` products along K, and one more of the left tiles in `last` where there are such: those lie
// TILE_FLOATS floats apart, each with rows of 64 bytes.
template <int A, int B, bool STREAM>
static __attribute__((noinline)) void tiles(const Operand* a, const Operand* b, int steps, const char* last, const Sums& c, bool add,
                                            Fetch& fetch) {
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
    Fetch soon = fetch;
    for (int i = 0; i < steps; i++) {
        soon.step();
        product<A, B, STREAM>(a0, a1, row_a, b0, b1, row_b0, row_b1);
        a0 += a[0].step, a1 += a[A - 1].step, b0 += b[0].step, b1 += b[B - 1].step;
    }
    fetch = soon;
    if (last) product<A, B, false>(last, last + TILE_FLOATS * sizeof(float), 64, b0, b1, row_b0, row_b1);
    TILE_STORE(0, c0, c.row);
    if constexpr (B == 2) TILE_STORE(1, c0 + c.b, c.row);
    if constexpr (A == 2) TILE_STORE(2, c2, c.row);
    if constexpr (A == 2 && B == 2) TILE_STORE(3, c2 + c.b, c.row);
}

// The same for one or two tiles on each side.
template <bool STREAM>
static inline void tiles_of(Shapes& shapes, const Operand* a, int na, const Operand* b, int nb, int steps, const char* last, const Sums& c,
                            bool add, Fetch& fetch) {
    shapes.set(a[0].size, a[na - 1].size, b[0].size, b[nb - 1].size);
    if (na == 2 && nb == 2) tiles<2, 2, STREAM>(a, b, steps, last, c, add, fetch);
    else if (na == 2) tiles<2, 1, STREAM>(a, b, steps, last, c, add, fetch);
    else if (nb == 2) tiles<1, 2, STREAM>(a, b, steps, last, c, add, fetch);
    else tiles<1, 1, STREAM>(a, b, steps, last, c, add, fetch);
}

}  // namespace amx
}  // namespace moec
