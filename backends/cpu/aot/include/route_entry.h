// One router's kernel called with arrays. Its exponential and log1p are those that torch was built with, so that scores
// and with them the chosen experts are torch's.
#pragma once
#include "calls.h"
#include "route.h"

#if defined(__AVX512F__)
extern "C" __m512 Sleef_expf16_u10(__m512);
extern "C" __m512 Sleef_log1pf16_u10(__m512);
#define MOEC_EXP Sleef_expf16_u10
#define MOEC_LOG1P Sleef_log1pf16_u10
#else
extern "C" __m256 Sleef_expf8_u10(__m256);
extern "C" __m256 Sleef_log1pf8_u10(__m256);
#define MOEC_EXP Sleef_expf8_u10
#define MOEC_LOG1P Sleef_log1pf8_u10
#endif

namespace moec_aot {

constexpr int64_t SHARE = 16384;  // logits that are worth a thread

template <class R> static inline void run_route(const RouteArrays& in) {
    moec::RouteCall c{};
    c.tokens = in.logits.sizes[0];
    c.logits = in.logits.data;
    c.row = in.logits.strides[0] * (int64_t)sizeof(typename R::Logit);
    c.bias = in.bias.data;
    c.weights = in.weights;
    c.ids = in.ids;
    c.exp = MOEC_EXP;
    c.log1p = MOEC_LOG1P;
    const int64_t worth = c.tokens * R::E / SHARE;
    c.threads = worth < in.threads ? worth : in.threads;
    moec::route<R>(c);
}

}  // namespace moec_aot
