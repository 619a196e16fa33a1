// AMX's tiles: eight registers of up to 16 rows of 64 bytes, whose shapes are a state of the thread.
//
// The compiler's intrinsics do not say which memory they read, so every one that reads stands behind a barrier. With
// MOEC_EMULATE_AMX the same names are plain C++ on a tile file of the thread, for processors that lack the instructions:
// it stops where a processor would raise a fault.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace moec {

// What LDTILECFG reads: for every tile its bytes in a row and its rows.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int height, int bytes) {
        rows[tile] = (uint8_t)height;
        row_bytes[tile] = (uint16_t)bytes;
    }
};

}  // namespace moec

#ifndef MOEC_EMULATE_AMX

#define MOEC_WRITTEN asm volatile("" ::: "memory")  // what was stored before is in memory
#define TILE_SHAPES(shapes) ({ MOEC_WRITTEN; _tile_loadconfig(shapes); })
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, at, row) ({ MOEC_WRITTEN; _tile_loadd(tile, at, row); })
#define TILE_STREAM(tile, at, row) ({ MOEC_WRITTEN; _tile_stream_loadd(tile, at, row); })
#define TILE_STORE(tile, at, row) _tile_stored(tile, at, row)
#define TILE_PRODUCT(c, a, b) _tile_dpbf16ps(c, a, b)

#else

namespace moec {

struct TileFile {
    TileShapes shapes;
    bool usable = false;
    alignas(64) char tile[8][16][64];

    static TileFile& mine() {
        static thread_local TileFile file;
        return file;
    }
    static void need(bool good) {
        if (!good) __builtin_trap();
    }
    // A denormal is zero, of the same sign.
    static inline float flush(float a) {
        uint32_t bits;
        memcpy(&bits, &a, 4);
        bits = bits & 0x7f800000 ? bits : bits & 0x80000000;
        memcpy(&a, &bits, 4);
        return a;
    }
    static inline float wide(uint32_t half) {
        half <<= 16;
        float a;
        memcpy(&a, &half, 4);
        return flush(a);
    }

    __attribute__((noinline)) void load(const TileShapes* s) {
        need(s->palette == 1 && s->start_row == 0);
        for (int i = 0; i < 16; i++) need(s->rows[i] <= 16 && s->row_bytes[i] <= 64 && (i < 8 || s->rows[i] + s->row_bytes[i] == 0));
        shapes = *s;
        usable = true;
        memset(tile, 0, sizeof tile);
    }
    void check(int i) const { need(usable && shapes.rows[i] && shapes.row_bytes[i]); }
    __attribute__((noinline)) void read(int i, const void* at, int64_t row) {
        check(i);
        memset(tile[i], 0, sizeof tile[i]);
        for (int r = 0; r < shapes.rows[i]; r++) memcpy(tile[i][r], (const char*)at + r * row, shapes.row_bytes[i]);
    }
    __attribute__((noinline)) void write(int i, void* at, int64_t row) const {
        check(i);
        for (int r = 0; r < shapes.rows[i]; r++) memcpy((char*)at + r * row, tile[i][r], shapes.row_bytes[i]);
    }
    __attribute__((noinline)) void zero(int i) {
        check(i);
        memset(tile[i], 0, sizeof tile[i]);
    }
    // TDPBF16PS as Intel's manual has it: even and odd products in two chains of fused multiply-adds that begin at zero,
    // their sum added to c; rounded to nearest even, denormals are zero on both sides.
    __attribute__((noinline)) void product(int c, int a, int b) {
        check(c), check(a), check(b);
        need(shapes.rows[c] == shapes.rows[a] && shapes.row_bytes[c] == shapes.row_bytes[b]);
        need(shapes.row_bytes[a] == 4 * shapes.rows[b] && shapes.row_bytes[b] % 4 == 0);
        for (int m = 0; m < shapes.rows[c]; m++) {
            float even[16] = {}, odd[16] = {}, sum[16];
            for (int k = 0; k < shapes.rows[b]; k++) {
                uint32_t left, right[16];
                memcpy(&left, tile[a][m] + 4 * k, 4);
                memcpy(right, tile[b][k], 64);
                const float first = wide(left & 0xffff), second = wide(left >> 16);
                for (int n = 0; n < 16; n++) even[n] = flush(__builtin_fmaf(first, wide(right[n] & 0xffff), even[n]));
                for (int n = 0; n < 16; n++) odd[n] = flush(__builtin_fmaf(second, wide(right[n] >> 16), odd[n]));
            }
            memcpy(sum, tile[c][m], 64);
            for (int n = 0; n < 16; n++) sum[n] = flush(flush(sum[n]) + flush(even[n] + odd[n]));
            memcpy(tile[c][m], sum, shapes.row_bytes[c]);
        }
    }
};

}  // namespace moec

#define TILE_SHAPES(shapes) moec::TileFile::mine().load(shapes)
#define TILE_RELEASE() (moec::TileFile::mine().usable = false)
#define TILE_ZERO(tile) moec::TileFile::mine().zero(tile)
#define TILE_LOAD(tile, at, row) moec::TileFile::mine().read(tile, at, row)
#define TILE_STREAM(tile, at, row) moec::TileFile::mine().read(tile, at, row)
#define TILE_STORE(tile, at, row) moec::TileFile::mine().write(tile, at, row)
#define TILE_PRODUCT(c, a, b) moec::TileFile::mine().product(c, a, b)

#endif
