// Elementary functions on vectors, to a few units in the last place of a float.
#pragma once
#include "types.h"

namespace moec {

// exp: range reduction by ln 2 in two parts, then the degree 6 polynomial of Cephes' expf.
static inline V exp(V x) {
    V c = min(set1(89.0f), max(set1(-104.0f), x));
    V n = nearest(c * set1(1.44269504f));
    V r = fma(n, set1(-0.693359375f), c);
    r = fma(n, set1(2.12194440e-4f), r);
    V p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r + set1(1.0f));
    return if_nan(x, x, scale2(p, n));
}

static inline V sigmoid(V x) { return set1(1.0f) / (set1(1.0f) + exp(negate(x))); }
static inline V silu(V x) { return x / (set1(1.0f) + exp(negate(x))); }

// tanh and erf: the rational minimax approximations of Eigen (13/6 and 13/8).
static inline V tanh(V x) {
    V c = min(set1(7.90531110763549805f), max(set1(-7.90531110763549805f), x));
    V s = c * c;
    V p = set1(-2.76076847742355e-16f);
    p = fma(p, s, set1(2.00018790482477e-13f));
    p = fma(p, s, set1(-8.60467152213735e-11f));
    p = fma(p, s, set1(5.12229709037114e-08f));
    p = fma(p, s, set1(1.48572235717979e-05f));
    p = fma(p, s, set1(6.37261928875436e-04f));
    p = fma(p, s, set1(4.89352455891786e-03f));
    V q = set1(1.19825839466702e-06f);
    q = fma(q, s, set1(1.18534705686654e-04f));
    q = fma(q, s, set1(2.26843463243900e-03f));
    q = fma(q, s, set1(4.89352518554385e-03f));
    return p * c / q;
}

static inline V erf(V x) {
    V c = min(set1(4.0f), max(set1(-4.0f), x));
    V s = c * c;
    V p = set1(-2.72614225801306e-10f);
    p = fma(p, s, set1(2.77068142495902e-08f));
    p = fma(p, s, set1(-2.10102402082508e-06f));
    p = fma(p, s, set1(-5.69250639462346e-05f));
    p = fma(p, s, set1(-7.34990630326855e-04f));
    p = fma(p, s, set1(-2.95459980854025e-03f));
    p = fma(p, s, set1(-1.60960333262415e-02f));
    V q = set1(-1.45660718464996e-05f);
    q = fma(q, s, set1(-2.13374055278905e-04f));
    q = fma(q, s, set1(-1.68282697438203e-03f));
    q = fma(q, s, set1(-7.37332916720468e-03f));
    q = fma(q, s, set1(-1.42647390514189e-02f));
    return p * c / q;
}

static inline V gelu(V x) { return set1(0.5f) * x * (set1(1.0f) + erf(x * set1(0.70710678f))); }
static inline V gelu_tanh(V x) {
    V inner = set1(0.79788456f) * fma(x * x * x, set1(0.044715f), x);
    return set1(0.5f) * x * (set1(1.0f) + tanh(inner));
}

// One element in every lane.
static inline V broadcast(const float* p) { return set1(*p); }
static inline V broadcast(const bf16* p) {
    uint32_t bits = (uint32_t)p->bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return set1(f);
}
static inline V broadcast(const f16* p) { return set1(_cvtsh_ss(p->bits)); }

// NaN wins, as in torch.
static inline V relu(V x) { return max(set1(0.0f), x); }
static inline V at_least(V x, V low) { return max(low, x); }
static inline V at_most(V x, V high) { return min(high, x); }
static inline V maximum(V a, V b) { return if_nan(a, a, max(a, b)); }
static inline V minimum(V a, V b) { return if_nan(a, a, min(a, b)); }

}  // namespace moec
