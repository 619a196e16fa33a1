// The planner of moe.regroup called with arrays.
#pragma once
#include "calls.h"
#include "regroup_plan.h"

namespace moec_aot {

// Part of the cost that has to be saved: between the points (tokens, part), ascending, on a line; beyond them as at the last one.
static inline double least_of(const double (*points)[2], int64_t count, double tokens) {
    if (count == 0) return 0;
    if (tokens <= points[0][0]) return points[0][1];
    for (int64_t i = 1; i < count; i++) {
        const double *from = points[i - 1], *to = points[i];
        if (tokens < to[0]) return (to[1] - from[1]) / (to[0] - from[0]) * (tokens - from[0]) + from[1];
    }
    return points[count - 1][1];
}

}  // namespace moec_aot
