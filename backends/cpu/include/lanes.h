// Across the lanes of vectors: rows of any length, the largest element, sums in torch's order, masks.
#pragma once
#include "types.h"

namespace moec {

constexpr float LOWEST = -__builtin_inff();

#if defined(__AVX512F__)
static inline V or_lowest(V a, int n) { return _mm512_mask_blend_ps(first(n), set1(LOWEST), a); }
static inline V below(V a, V bound) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, bound, _CMP_LT_OQ), set1(LOWEST), a);
}
static inline V if_above(V test, V bound, V yes, V no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(test, bound, _CMP_GT_OQ), no, yes);
}
static inline unsigned equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline unsigned nans(V a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
static inline float highest(V a) { return _mm512_reduce_max_ps(a); }
static inline float sum_lanes(V a) {
    __m256 b = _mm512_castps512_ps256(a) + _mm512_extractf32x8_ps(a, 1);
    __m128 c = _mm256_castps256_ps128(b) + _mm256_extractf128_ps(b, 1);
    c = c + _mm_movehl_ps(c, c);
    return c[0] + c[1];
}
#else
static inline V or_lowest(V a, int n) { return _mm256_blendv_ps(set1(LOWEST), a, _mm256_castsi256_ps(first(n))); }
static inline V below(V a, V bound) { return _mm256_blendv_ps(set1(LOWEST), a, _mm256_cmp_ps(a, bound, _CMP_LT_OQ)); }
static inline V if_above(V test, V bound, V yes, V no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(test, bound, _CMP_GT_OQ));
}
static inline unsigned equal(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
static inline unsigned nans(V a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
static inline float highest(V a) {
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return c[0] > c[1] ? c[0] : c[1];
}
static inline float sum_lanes(V a) {
    __m128 c = _mm256_castps256_ps128(a) + _mm256_extractf128_ps(a, 1);
    c = c + _mm_movehl_ps(c, c);
    return c[0] + c[1];
}
#endif

// The i-th vector of N elements; -inf past the end.
template <int N, class T> static inline V piece(const T* p, int i) {
    if (N % W == 0 || (i + 1) * W <= N) return load(p + i * W);
    return or_lowest(load_n(p + i * W, N - i * W), N - i * W);
}
template <int N> constexpr int PIECES = (N + W - 1) / W;
template <int N> constexpr int ROOM = PIECES<N> * W;  // floats of a row in whole vectors

}  // namespace moec
