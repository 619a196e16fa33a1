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
static inline void store_n(float* p, V a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
static inline void store_n(bf16* p, V a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }
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

// Sums over lanes, in halves (i, i+8), (i, i+4), (i, i+2), (i, i+1): one tree wherever a row stands.
// fold: the four 128-bit lanes of the result are four partial sums of each argument.
constexpr int FOLD = 4;
static inline V fold(const V* v) {
    V ab = _mm512_shuffle_f32x4(v[0], v[1], 0x44) + _mm512_shuffle_f32x4(v[0], v[1], 0xee);
    V cd = _mm512_shuffle_f32x4(v[2], v[3], 0x44) + _mm512_shuffle_f32x4(v[2], v[3], 0xee);
    return _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
}
// Element e of each 128-bit lane is the sum of that lane of u[e].
static inline V finish(const V* u) {
    auto half = [](V a, V b) {
        __m512d p = _mm512_castps_pd(a), q = _mm512_castps_pd(b);
        return _mm512_castpd_ps(_mm512_unpacklo_pd(p, q)) + _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
    };
    V s = half(u[0], u[1]), t = half(u[2], u[3]);
    return _mm512_shuffle_ps(s, t, 0x88) + _mm512_shuffle_ps(s, t, 0xdd);
}
static inline void put_lane(float* p, V a, int lane, bool add) {
    __m128 v = lane == 0   ? _mm512_castps512_ps128(a)
               : lane == 1 ? _mm512_extractf32x4_ps(a, 1)
               : lane == 2 ? _mm512_extractf32x4_ps(a, 2)
                           : _mm512_extractf32x4_ps(a, 3);
    _mm_storeu_ps(p, add ? _mm_loadu_ps(p) + v : v);
}

}  // namespace moec
