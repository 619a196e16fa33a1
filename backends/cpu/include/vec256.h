// Eight floats, for AVX2 with FMA and F16C. The same functions as vec512.h.
#pragma once

namespace moec {

using V = __m256;
constexpr int W = 8;

static inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline V zero() { return _mm256_setzero_ps(); }
static inline V set1(float a) { return _mm256_set1_ps(a); }
static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V max(V a, V b) { return _mm256_max_ps(a, b); }
static inline V min(V a, V b) { return _mm256_min_ps(a, b); }
static inline V nearest(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V absolute(V a) { return _mm256_andnot_ps(set1(-0.0f), a); }
static inline V negate(V a) { return _mm256_xor_ps(set1(-0.0f), a); }
static inline V root(V a) { return _mm256_sqrt_ps(a); }
static inline V if_nan(V test, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(test, test, _CMP_UNORD_Q)); }
static inline V scale2(V a, V n) {
    // In two steps, so that neither factor leaves the range of exponents.
    V c = min(set1(254.0f), max(set1(-252.0f), n));
    __m256i i = _mm256_cvtps_epi32(c), h = _mm256_srai_epi32(i, 1), bias = _mm256_set1_epi32(127);
    V one = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(h, bias), 23));
    V two = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, h), bias), 23));
    return a * one * two;
}

static inline V widen(__m128i b) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16)); }
static inline __m128i narrow(V a) {
    __m256i i = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(i, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(i, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    return _mm256_castsi256_si128(r);
}

template <class T> static inline __m128i words(const T* p) { return _mm_loadu_si128((const __m128i*)p); }
template <class T> static inline __m128i words_n(const T* p, int n) {
    if (n >= 8) return words(p);
    __m128i b = _mm_setzero_si128();
    memcpy(&b, p, 2 * (n > 0 ? n : 0));
    return b;
}
static inline V load(const float* p) { return _mm256_loadu_ps(p); }
static inline V load(const bf16* p) { return widen(words(p)); }
static inline V load(const f16* p) { return _mm256_cvtph_ps(words(p)); }
// The first n elements, zeros after them; nothing past them is read.
static inline V load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
static inline V load_n(const bf16* p, int n) { return widen(words_n(p, n)); }
static inline V load_n(const f16* p, int n) { return _mm256_cvtph_ps(words_n(p, n)); }
template <class T> static inline void put_words(T* p, __m128i b, int n) {
    if (n >= 8) _mm_storeu_si128((__m128i*)p, b);
    else if (n > 0) memcpy(p, &b, 2 * n);
}
static inline void store(float* p, V a) { _mm256_storeu_ps(p, a); }
static inline void store_n(float* p, V a, int n) { _mm256_maskstore_ps(p, first(n), a); }
static inline void store_n(bf16* p, V a, int n) { put_words(p, narrow(a), n); }
// 2 W elements past the caches, to whole lines.
static inline void stream(float* p, V a, V b) { _mm256_stream_ps(p, a), _mm256_stream_ps(p + W, b); }
static inline void stream_words(void* p, __m128i a, __m128i b) { _mm256_stream_si256((__m256i*)p, _mm256_set_m128i(b, a)); }
static inline void stream(bf16* p, V a, V b) { stream_words(p, narrow(a), narrow(b)); }
static inline void stream(f16* p, V a, V b) { stream_words(p, _mm256_cvtps_ph(a, 0), _mm256_cvtps_ph(b, 0)); }
static inline void store_n(f16* p, V a, int n) { put_words(p, _mm256_cvtps_ph(a, 0), n); }

// Even and odd elements of the 2 W floats at p.
static inline void load_pairs(const float* p, V& even, V& odd) {
    V a = load(p), b = load(p + 8);
    auto order = [](V v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); };
    even = order(_mm256_shuffle_ps(a, b, 0x88));
    odd = order(_mm256_shuffle_ps(a, b, 0xdd));
}

static inline V keep_n(V a, int n) { return _mm256_and_ps(_mm256_castsi256_ps(first(n)), a); }  // zeros past the first n

template <class T> static inline V round_to(V a);
template <> inline V round_to<float>(V a) { return a; }
template <> inline V round_to<bf16>(V a) { return widen(narrow(a)); }
template <> inline V round_to<f16>(V a) { return _mm256_cvtph_ps(_mm256_cvtps_ph(a, 0)); }

// r[i] becomes the i-th element of every r[..]: 8 x 8, bits untouched.
static inline __attribute__((always_inline)) void transpose(V* r) {
    auto pd = [](V a) { return _mm256_castps_pd(a); };
    V t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(pd(t[i]), pd(t[i + 2])));
        r[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(pd(t[i]), pd(t[i + 2])));
        r[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(pd(t[i + 1]), pd(t[i + 3])));
        r[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(pd(t[i + 1]), pd(t[i + 3])));
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        V a = r[c], b = r[4 + c];
        r[c] = _mm256_permute2f128_ps(a, b, 0x20);
        r[4 + c] = _mm256_permute2f128_ps(a, b, 0x31);
    }
}

}  // namespace moec
