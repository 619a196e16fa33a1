// The router: one token after the other, everything about a token in the first cache.
//
// Which experts are chosen must not depend on who computes it, so scores are torch's to the last bit: every torch op
// computes in f32 and rounds to its type, the exponential and log1p are the very functions torch calls (passed in), and
// the softmax adds up lane by lane as torch does on a processor of this width. Where torch's elementwise ops leave their
// vector loop (the last elements of a tensor or of a thread's share) its own scores differ by a unit in the last place;
// its square root may everywhere.
//
// Selecting on the logits instead, since softmax and sigmoid are monotone, would be wrong where two logits round to one
// score: torch then breaks a tie. So the selection is on the scores, and ties are broken by torch's own algorithm.
#pragma once
#include <algorithm>

#include "lanes.h"

namespace moec {

using Function = V (*)(V);

// What Python passes: 64-bit fields alone, in this order.
struct RouteCall {
    const char* logits;
    int64_t row;  // bytes
    const void* bias;
    char* weights;
    int64_t* ids;
    int64_t tokens;
    Function exp, log1p;
    int64_t threads;
};

enum class Scoring { softmax, sigmoid, identity, sqrtsoftplus };

struct Entry {
    int32_t key, at;
};

// Values as integers in the same order, NaN above all.
template <int N> static inline void keys(const float* c, Entry* q) {
    for (int i = 0; i < N; i++) {
        float value = c[i] + 0.0f;  // -0 and 0 are one value
        int32_t bits;
        memcpy(&bits, &value, 4);
        q[i] = {value != value ? INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX), i};
    }
}

// torch.topk on the CPU: std::partial_sort, or std::nth_element and std::sort, on pairs compared by value, NaN first.
// The algorithms see nothing but the outcomes of comparisons, so integers in the same order give the same ids.
template <int N> static __attribute__((noinline)) void top_as_torch(const float* c, int k, bool sorted, int32_t* ids) {
    Entry q[N];
    keys<N>(c, q);
    auto before = [](const Entry& x, const Entry& y) { return x.key > y.key; };
    if (k * 64 <= N) {
        std::partial_sort(q, q + k, q + N, before);
    } else {
        std::nth_element(q, q + k - 1, q + N, before);
        if (sorted) std::sort(q, q + k - 1, before);
    }
    for (int j = 0; j < k; j++) ids[j] = q[j].at;
}

// The k largest, best first; of equal ones the first.
template <int N> static __attribute__((noinline)) void top_and_first(const float* c, int k, int32_t* ids) {
    Entry q[N];
    keys<N>(c, q);
    auto before = [](const Entry& x, const Entry& y) { return x.key > y.key || (x.key == y.key && x.at < y.at); };
    std::partial_sort(q, q + k, q + N, before);
    for (int j = 0; j < k; j++) ids[j] = q[j].at;
}

// The k largest, best first, if their order is clear. False where equal values, NaN or -inf would decide.
template <int N> static inline bool top_if_clear(const float* c, int k, int32_t* ids) {
    V most = set1(LOWEST);
    unsigned nan = 0;
    for (int i = 0; i < PIECES<N>; i++) {
        V x = piece<N>(c, i);
        nan |= nans(x);
        most = max(most, x);
    }
    if (nan) return false;
    float value = highest(most);
    for (int j = 0; j < k; j++) {
        if (value == LOWEST) return false;
        V at = set1(value), next = set1(LOWEST);
        int found = 0, where = 0;
        for (int i = 0; i < PIECES<N>; i++) {
            V x = piece<N>(c, i);
            unsigned here = equal(x, at);
            found += __builtin_popcount(here);
            where = here ? i * W + __builtin_ctz(here) : where;
            next = max(next, below(x, at));
        }
        if (found != 1) return false;
        ids[j] = where;
        value = highest(next);
    }
    return true;
}

// Largest of N values, or the sum of the largest two; NaN where one is NaN.
template <int N, bool TWO> static inline float group_worth(const float* c) {
    V most = set1(LOWEST), second = set1(LOWEST);
    unsigned nan = 0;
    for (int i = 0; i < PIECES<N>; i++) {
        V x = piece<N>(c, i);
        nan |= nans(x);
        second = max(second, min(most, x));
        most = max(most, x);
    }
    if (nan) return __builtin_nanf("");
    float value = highest(most);
    if (!TWO) return value;
    // The runner-up leads another lane, or is second in a lane.
    unsigned leaders = __builtin_popcount(equal(most, set1(value)));
    return value + (leaders > 1 ? value : std::max(highest(below(most, set1(value))), highest(second)));
}

// Scores of N logits in place; torch rounds every op's result to S.
template <class S, int N> static inline void softmax(float* s, Function exp) {
    V most = set1(LOWEST), sum = zero();
    for (int i = 0; i < PIECES<N>; i++) most = max(most, piece<N>(s, i));
    const V top = set1(highest(most));
    for (int i = 0; i < PIECES<N>; i++) {
        V e = exp(piece<N>(s, i) - top);  // 0 past the end
        store(s + i * W, e);
        sum = i ? sum + e : e;
    }
    float total = s[0];
    if (N >= W) total = sum_lanes(sum);
    else
        for (int i = 1; i < N; i++) total += s[i];
    const V inverse = set1(1.0f / total);
    for (int i = 0; i < PIECES<N>; i++) store(s + i * W, round_to<S>(load(s + i * W) * inverse));
}

template <class S, Scoring KIND, int N> static inline void score(float* s, const RouteCall& c) {
    if constexpr (KIND == Scoring::softmax) {
        softmax<S, N>(s, c.exp);
    } else if constexpr (KIND != Scoring::identity) {
        for (int i = 0; i < PIECES<N>; i++) {
            V x = load(s + i * W);
            if constexpr (KIND == Scoring::sigmoid) {
                x = round_to<S>(set1(1.0f) / (set1(1.0f) + c.exp(negate(x))));
            } else {
                V soft = if_above(x, set1(20.0f), x, c.log1p(c.exp(x)));
                x = round_to<S>(root(round_to<S>(soft)));
            }
            store(s + i * W, x);
        }
    }
}

template <class S> static inline float rounded(float a) { return round_to<S>(set1(a))[0]; }

template <class R> struct Router {
    using S = typename R::Score;
    const RouteCall& call;

    // Adds the bias and leaves nothing but the best groups, for the selection alone.
    void choice(const float* s, float* c) const {
        using C = typename R::Choice;
        const auto* bias = (const typename R::Bias*)call.bias;
        for (int i = 0; i < PIECES<R::E>; i++) {
            V x = load(s + i * W);
            if (R::BIAS) x = round_to<C>(x + piece<R::E>(bias, i));
            store(c + i * W, x);
        }
        if constexpr (R::GROUPS > 0 && R::PER_GROUP == 0) {
            constexpr int G = R::E / R::GROUPS;
            alignas(64) float worth[ROOM<R::GROUPS>];
            int32_t best[R::GROUPS];
            bool kept[R::GROUPS] = {};
            for (int g = 0; g < R::GROUPS; g++) worth[g] = rounded<C>(group_worth<G, R::TWO>(c + g * G));
            if (!top_if_clear<R::GROUPS>(worth, R::TOP_GROUPS, best)) top_as_torch<R::GROUPS>(worth, R::TOP_GROUPS, false, best);
            for (int j = 0; j < R::TOP_GROUPS; j++) kept[best[j]] = true;
            const float fill = rounded<C>(R::FILL);
            for (int g = 0; g < R::GROUPS; g++)
                if (!kept[g]) std::fill(c + g * G, c + (g + 1) * G, fill);
        }
    }

    template <int N> static void top(const float* c, int k, int32_t* ids) {
        // Unsorted, torch leaves them as its algorithm does: in an order that only the algorithm knows.
        if (R::SORTED && top_if_clear<N>(c, k, ids)) return;
        if (R::FIRST) top_and_first<N>(c, k, ids);
        else top_as_torch<N>(c, k, R::SORTED, ids);
    }

    // The best of every group; then, unless they are wanted group after group, the order of all.
    static void top_of_groups(float* c, int32_t* ids) {
        constexpr int G = R::E / R::GROUPS, EACH = R::PER_GROUP;
        bool taken[R::E] = {};
        for (int g = 0; g < R::GROUPS; g++) {
            top<G>(c + g * G, EACH, ids + g * EACH);
            for (int j = 0; j < EACH; j++) taken[ids[g * EACH + j] += g * G] = true;
        }
        if (R::BY_GROUP) return;
        for (int i = 0; i < R::E; i++) c[i] = taken[i] ? c[i] : LOWEST;
        top<R::E>(c, R::K, ids);
    }

    void token(int64_t t) const {
        alignas(64) float s[ROOM<R::E>], w[ROOM<R::K>] = {};
        int32_t ids[R::K];
        const auto* logits = (const typename R::Logit*)(call.logits + t * call.row);
        for (int i = 0; i < PIECES<R::E>; i++) store(s + i * W, round_to<S>(piece<R::E>(logits, i)));
        if constexpr (!R::TOPK_FIRST) score<S, R::SCORING, R::E>(s, call);
        if constexpr (!R::TOPK_FIRST && (R::BIAS || R::GROUPS > 0)) {
            alignas(64) float c[ROOM<R::E>];
            choice(s, c);
            if constexpr (R::PER_GROUP > 0) top_of_groups(c, ids);
            else top<R::E>(c, R::K, ids);
            if (R::MASKED) memcpy(s, c, sizeof s);
        } else {
            top<R::E>(s, R::K, ids);
        }
        for (int j = 0; j < R::K; j++) {
            w[j] = s[ids[j]];
            call.ids[t * R::K + j] = ids[j];
        }
        if constexpr (R::TOPK_FIRST) score<S, R::SCORING, R::K>(w, call);
        V total = set1(1.0f);
        if (R::RENORMALIZE) {
            float sum = 0.0f;
            for (int j = 0; j < R::K; j++) sum += w[j];
            total = round_to<S>(set1(sum));
            if (R::EPS != 0.0f) total = round_to<S>(total + set1(R::EPS));
        }
        auto* out = (typename R::Out*)call.weights + t * R::K;
        for (int j = 0; j < R::K; j += W) {
            V x = load(w + j);
            if (R::RENORMALIZE) x = round_to<S>(x / total);
            if (R::SCALE != 1.0f) x = round_to<S>(x * set1(R::SCALE));
            store_n(out + j, x, R::K - j);
        }
    }
};

template <class R> static inline void route(const RouteCall& call) {
    const Router<R> router{call};
    if (call.threads <= 1) {
        for (int64_t t = 0; t < call.tokens; t++) router.token(t);
        return;
    }
#pragma omp parallel for num_threads((int)call.threads) schedule(static)
    for (int64_t t = 0; t < call.tokens; t++) router.token(t);
}

}  // namespace moec
