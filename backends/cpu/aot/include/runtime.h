// What every dispatcher uses: the processor's level, working memory, and tensors behind torch's C interface.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <string>

#include "calls.h"

namespace moec_aot {

// The levels of backends/cpu/isa.py, from the lowest to the highest; NONE is below all of them.
enum Level { NONE, AVX2, AVX512, AVX512_BF16, AMX, LEVELS };

// The highest level of this processor and operating system, or a lower one that MOEC_ISA names.
Level level();

// Of kernels by level, the one for this processor: the highest that is there and not above level(). Throws where there is
// none: what this processor is, and what the artifact was built for.
template <class Kernel> Kernel choose(Kernel const (&kernels)[LEVELS]);
[[noreturn]] void refuse(const char* lowest);

Memory shared_memory();
int64_t threads();  // of a call: what torch.set_num_threads, OMP_NUM_THREADS or omp_set_num_threads say

Array array_of(AtenTensorHandle tensor);
AtenTensorHandle empty(int64_t rows, int64_t columns, int32_t dtype, char** data);
AtenTensorHandle empty_vector(int64_t size, int64_t** data);  // i64

// Throws unless ids are experts; the message names the op.
void check_ids(const Array& ids, int64_t experts, const char* op);
void check_contiguous(const Array& matrix, const char* what, const char* op);

template <class Kernel> Kernel choose(Kernel const (&kernels)[LEVELS]) {
    static const char* const names[LEVELS] = {"none", "avx2", "avx512", "avx512_bf16", "amx"};
    for (int i = level(); i > NONE; i--)
        if (kernels[i]) return kernels[i];
    for (int i = AVX2; i < LEVELS; i++)
        if (kernels[i]) refuse(names[i]);
    refuse("nothing");
}

}  // namespace moec_aot
