// The same on AMX: two by two tiles at a time.
#pragma once
#include "amx_block.h"

namespace moec {

template <> struct Sweep<bf16> {
    using Tiles = amx::Tiles;
    static constexpr int ROWS = amx::TILE;

    template <class Of>
    void over(const float* panel, int n, int runs, int first, int last, Of&& of, int ldc, bool add, Ahead& ahead) {
        Paced soon{ahead};
        for (int t = first; t < last; t += 2) {
            const Packet<bf16> p = of(t);
            amx::Operand rows[2] = {{(const char*)p.at, 64, (int64_t)p.size * 64, p.size}, {}};
            const int na = t + 1 < last ? 2 : 1;
            if (na == 2) {
                const Packet<bf16> q = of(t + 1);
                rows[1] = {(const char*)q.at, 64, (int64_t)q.size * 64, q.size};
            }
            for (int at = 0; at < n; at += 2 * amx::TILE)
                amx::over_panel(shapes, rows, na, panel + at, n - at, runs, p.sums + at, ldc, add, soon);
        }
    }
    static int64_t steps(int tiles, int n, int runs) { return (int64_t)((tiles + 1) / 2) * ((n + 31) / 32) * runs; }

private:
    struct Paced {
        Ahead& ahead;
        int i = 0;
        inline __attribute__((always_inline)) void next() { ahead.step<false>(i++); }
    };
    amx::Shapes shapes;
};

}  // namespace moec
