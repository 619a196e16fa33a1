// Sixteen floats. `max` and `min` give their second operand where either is NaN, as the instructions do.
#pragma once

namespace moec {

using V = __m512;
constexpr int W = 16;

static inline __mmask16 first(int n) { return n >= 16 ? 0xffff : n > 0 ? (__mmask16)((1u << n) - 1) : 0; }
static inline V zero() { return _mm512_setzero_ps(); }
static inline V set1(float a) { return _mm512_set1_ps(a); }
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V max(V a, V b) { return _mm512_max_ps(a, b); }
static inline V min(V a, V b) { return _mm512_min_ps(a, b); }
static inline V nearest(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V scale2(V a, V n) { return _mm512_scalef_ps(a, n); }  // a * 2^n, to infinity or zero
static inline V absolute(V a) { return _mm512_abs_ps(a); }
static inline V negate(V a) { return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN))); }
static inline V root(V a) { return _mm512_sqrt_ps(a); }
static inline V if_nan(V test, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(test, test, _CMP_UNORD_Q), no, yes); }

static inline V widen(__m256i b) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)); }
static inline __m256i narrow(V a) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(a);
#else
    __m512i i = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(i, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(r);
#endif
}

static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline V load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
static inline V load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// The first n elements, zeros after them; nothing past them is read.
static inline V load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
static inline V load_n(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
static inline V load_n(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
static inline void store(float* p, V a) { _mm512_storeu_ps(p, a); }
static inline void store_n(float* p, V a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
static inline void store_n(bf16* p, V a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }
// 2 W elements past the caches, to whole lines.
static inline void stream(float* p, V a, V b) { _mm512_stream_ps(p, a), _mm512_stream_ps(p + W, b); }
static inline void stream_line(void* p, __m256i a, __m256i b) {
    _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}
static inline void stream(bf16* p, V a, V b) { stream_line(p, narrow(a), narrow(b)); }
static inline void stream(f16* p, V a, V b) { stream_line(p, _mm512_cvtps_ph(a, 0), _mm512_cvtps_ph(b, 0)); }
static inline void store_n(f16* p, V a, int n) { _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a, 0)); }

// Even and odd elements of the 2 W floats at p.
static inline void load_pairs(const float* p, V& even, V& odd) {
    const __m512i pick = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    V a = load(p), b = load(p + 16);
    even = _mm512_permutex2var_ps(a, pick, b);
    odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(pick, _mm512_set1_epi32(1)), b);
}

static inline V keep_n(V a, int n) { return _mm512_maskz_mov_ps(first(n), a); }  // zeros past the first n

template <class T> static inline V round_to(V a);
template <> inline V round_to<float>(V a) { return a; }
template <> inline V round_to<bf16>(V a) { return widen(narrow(a)); }
template <> inline V round_to<f16>(V a) { return _mm512_cvtph_ps(_mm512_cvtps_ph(a, 0)); }

// r[i] becomes the i-th element of every r[..]: 16 x 16, bits untouched.
static inline __attribute__((always_inline)) void transpose(V* r) {
    auto lo = [](V a, V b) { return _mm512_unpacklo_ps(a, b); };
    auto hi = [](V a, V b) { return _mm512_unpackhi_ps(a, b); };
    auto lo2 = [](V a, V b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
    auto hi2 = [](V a, V b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
    V t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = lo(r[i], r[i + 1]);
        t[i + 1] = hi(r[i], r[i + 1]);
    }
    // Of rows 4g .. 4g + 3: lane l of r[4g + c] holds their elements 4l + c.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = lo2(t[i], t[i + 2]);
        r[i + 1] = hi2(t[i], t[i + 2]);
        r[i + 2] = lo2(t[i + 1], t[i + 3]);
        r[i + 3] = hi2(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        V a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
        V d = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88), e = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
        r[c] = _mm512_shuffle_f32x4(a, d, 0x88);
        r[8 + c] = _mm512_shuffle_f32x4(a, d, 0xdd);
        r[4 + c] = _mm512_shuffle_f32x4(b, e, 0x88);
        r[12 + c] = _mm512_shuffle_f32x4(b, e, 0xdd);
    }
}

}  // namespace moec
