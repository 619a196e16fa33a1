// The planner of moe.regroup as a library's only function.
#include "regroup_plan.h"

extern "C" __attribute__((visibility("default"))) void moec_regroup(
    const void* const* ids, const int64_t* rows, int64_t inputs, int64_t k, int64_t wide, int64_t experts,
    const int32_t* column, int64_t columns, const int64_t* sizes, int64_t batches, double least, int64_t price,
    int64_t* const* there, int64_t* const* home) {
  plan(ids, rows, inputs, k, wide, experts, column, columns, sizes, batches, least, price, there, home);
}
