// Packed rows, a few to a tile, pass over a panel: the inner loops of the backward's GEMMs.
#pragma once
#include "block.h"

namespace moec {

// A tile of packed rows: where the slice begins, its rows, and where their sums go.
template <class T> struct Packet {
    const Packed<T>* at;
    int size;
    float* sums;
};

template <class T> struct Sweep {
    using Tiles = moec::Tiles;
    static constexpr int ROWS = TILE_TOKENS;  // of a full tile

    // sums[r * ldc + n] (+)= rows times panel, for tiles `first` to `last` (`of(t)` is a Packet) and the first n outputs of
    // the panel, at least; `runs` runs of K.
    template <class Of>
    void over(const float* panel, int, int runs, int first, int last, Of&& of, int ldc, bool add, Ahead& ahead) {
        for (int t = first; t < last; t++) {
            const Packet<T> p = of(t);
            tile_of<T, false>(p.size, panel, p.at, runs, p.sums, ldc, add, ahead);
        }
    }
    // How many steps of `ahead` it takes for so many tiles and outputs, all panels together.
    static int64_t steps(int tiles, int n, int runs) { return (int64_t)tiles * runs * W * ((n + GROUP - 1) / GROUP); }
};

}  // namespace moec

#if defined(__AMX_BF16__) || defined(MOEC_EMULATE_AMX)
#include "amx_sweep.h"
#endif
