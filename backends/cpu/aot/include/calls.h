// What a dispatcher hands to the code of one instruction set: plain pointers, sizes and strides.
//
// Dispatchers are built for any x86-64, kernels for one instruction set each; this is all that both include.
#pragma once
#include <stdint.h>

namespace moec_aot {

// A tensor; strides count elements.
struct Array {
    char* data;
    const int64_t* sizes;
    const int64_t* strides;
};

// Working memory that calls share; see runtime.cpp.
struct Memory {
    char* (*take)(int64_t bytes);
    void (*give_back)(char* memory);
};

struct ExpertsArrays {
    Array x, ids, weights;
    const Array* params;
    char* out;
    int64_t threads;
    Memory memory;
};

struct RouteArrays {
    Array logits, bias;  // bias.data is null where there is none
    char* weights;
    int64_t* ids;
    int64_t threads;
};

struct RegroupArrays {
    const char* const* ids;  // i64[rows[i], k] of every micro-batch
    const int64_t* rows;
    const int64_t* sizes;  // of every batch
    int64_t k;
    int64_t* const* there;  // i64[sizes[i]]
    int64_t* const* home;   // i64[rows[i]]
};

}  // namespace moec_aot
