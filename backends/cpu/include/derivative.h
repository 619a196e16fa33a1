// What derivatives of activations need beside their forward functions.
#pragma once
#include "math.h"

namespace moec {

#if defined(__AVX512F__)
// Lane by lane, `yes` where `a TEST b`.
template <int TEST> static inline V where(V a, V b, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, TEST), no, yes); }
// a0 b0 a1 b1 ...
static inline void interleave(V a, V b, V& low, V& high) {
    const __m512i pick = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    low = _mm512_permutex2var_ps(a, pick, b);
    high = _mm512_permutex2var_ps(a, _mm512_add_epi32(pick, _mm512_set1_epi32(8)), b);
}
#else
template <int TEST> static inline V where(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, TEST)); }
static inline void interleave(V a, V b, V& low, V& high) {
    V even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
    low = _mm256_permute2f128_ps(even, odd, 0x20);
    high = _mm256_permute2f128_ps(even, odd, 0x31);
}
#endif

}  // namespace moec
