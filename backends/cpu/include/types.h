// Element types of tensors. Arithmetic happens on vectors of float; these only name how memory is read and written.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace moec {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

}  // namespace moec

#if defined(__AVX512F__)
#include "vec512.h"
#else
#include "vec256.h"
#endif
